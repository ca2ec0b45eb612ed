"""torch modules: the structured linear layer, and reference models built from it."""

from einlinear.nn.gpt import GPT
from einlinear.nn.linear import Linear
from einlinear.nn.mlp import ResidualMLP
from einlinear.nn.model import ReferenceModel
from einlinear.nn.vit import ViT

__all__ = ["GPT", "Linear", "ReferenceModel", "ResidualMLP", "ViT"]
