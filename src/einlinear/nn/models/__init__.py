"""Reference models, as the papers set them up, with any linear layer structured."""

from einlinear.nn.models.gpt import GPT
from einlinear.nn.models.mlp import ResidualMLP
from einlinear.nn.models.model import ReferenceModel
from einlinear.nn.models.vit import ViT

__all__ = ["GPT", "ReferenceModel", "ResidualMLP", "ViT"]
