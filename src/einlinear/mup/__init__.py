"""Structure-aware muP: initialisation, learning rates, decay and eps per parameter, optimizers, coordinate check."""

from einlinear.mup.base_model import base_shapes
from einlinear.mup.blockwise import Blockwise
from einlinear.mup.coordinate_check import Coordinates, coord_check
from einlinear.mup.group_check import check_groups
from einlinear.mup.hyperparameters import Hyperparameters
from einlinear.mup.muon import Muon
from einlinear.mup.parametrization import init_, param_groups

__all__ = [
    "Blockwise",
    "Coordinates",
    "Hyperparameters",
    "Muon",
    "base_shapes",
    "check_groups",
    "coord_check",
    "init_",
    "param_groups",
]
