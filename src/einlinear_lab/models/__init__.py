"""Reference models, as the papers set them up, with any linear layer structured."""

from einlinear_lab.models.gpt import GPT
from einlinear_lab.models.mlp import ResidualMLP
from einlinear_lab.models.model import ReferenceModel
from einlinear_lab.models.vit import ViT

__all__ = ["GPT", "ReferenceModel", "ResidualMLP", "ViT"]
