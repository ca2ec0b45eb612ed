"""torch modules: the structured linear layer, and in `models` the reference models built from it."""

from einlinear.nn.linear import Linear
from einlinear.nn.models import GPT, ReferenceModel, ResidualMLP, ViT

__all__ = ["GPT", "Linear", "ReferenceModel", "ResidualMLP", "ViT"]
