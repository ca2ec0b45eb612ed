"""Structure-aware muP: initialisation, learning rates per parameter, coordinate check."""

from einlinear.parametrize.coord_check import Coordinates, coord_check
from einlinear.parametrize.initialization import init_
from einlinear.parametrize.mup import base_shapes, param_groups

__all__ = ["Coordinates", "base_shapes", "coord_check", "init_", "param_groups"]
