"""Structured linear layers for PyTorch: any einsum as a drop-in `nn.Linear`, with the learning rates it needs."""

from einlinear.compression import compress, distill
from einlinear.conversion import convert, densify, fuse, unfuse
from einlinear.integrations.transformers import register_on_import as _register_on_import
from einlinear.mup import base_shapes, check_groups, coord_check, init_, param_groups
from einlinear.nn import FeedForward, Linear, MoELinear, moe_loads, moe_loss
from einlinear.nn.explanation import explain
from einlinear.ops import backend
from einlinear.structures import Structure, register_family, structure
from einlinear.version import __version__

# layers and structures, training, existing models
__all__ = ["FeedForward", "Linear", "MoELinear", "Structure", "__version__", "backend", "explain", "register_family"]
__all__ += ["structure"]
__all__ += ["base_shapes", "check_groups", "coord_check", "init_", "moe_loads", "moe_loss", "param_groups"]
__all__ += ["compress", "convert", "densify", "distill", "fuse", "unfuse"]

_register_on_import()
