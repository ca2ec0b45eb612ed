"""Structure-aware muP: initialisation, learning rates per parameter, Muon, coordinate check."""

from einlinear.mup.base_model import base_shapes
from einlinear.mup.coordinates import Coordinates, coord_check
from einlinear.mup.optim import Muon
from einlinear.mup.parametrization import init_, param_groups

__all__ = ["Coordinates", "Muon", "base_shapes", "coord_check", "init_", "param_groups"]
