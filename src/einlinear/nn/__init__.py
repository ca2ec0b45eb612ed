"""torch modules: the structured linear layer, and reference models built from it."""

from einlinear.nn.linear import Linear
from einlinear.nn.mlp import ResidualMLP

__all__ = ["Linear", "ResidualMLP"]
