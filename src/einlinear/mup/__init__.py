"""Structure-aware muP: initialisation, learning rates per parameter, Muon, coordinate check."""

from einlinear.mup.coordinates import Coordinates, coord_check
from einlinear.mup.groups import base_shapes, param_groups
from einlinear.mup.initialization import init_
from einlinear.mup.optim import Muon

__all__ = ["Coordinates", "Muon", "base_shapes", "coord_check", "init_", "param_groups"]
