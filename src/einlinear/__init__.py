"""Structured linear layers for PyTorch: any einsum as a drop-in `nn.Linear`, with the learning rates it needs."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from einlinear.adapters import adapt
from einlinear.conversion import convert, densify
from einlinear.fusion import fuse, unfuse
from einlinear.integrations import register_on_import as _register_on_import
from einlinear.mup import base_shapes, check_groups, coord_check, init_, param_groups
from einlinear.nn import Conv1d, Conv2d, Embedding, FeedForward, Linear, MoELinear, moe_loads, moe_loss
from einlinear.nn.explanation import explain
from einlinear.ops import backend
from einlinear.structures import Structure, register_family, structure
from einlinear.version import __version__

if _TYPE_CHECKING:
    from einlinear.compression import compress, distill

# layers and structures, training, existing models
__all__ = ["Conv1d", "Conv2d", "Embedding", "FeedForward", "Linear", "MoELinear", "Structure", "__version__", "backend"]
__all__ += ["explain", "register_family", "structure"]
__all__ += ["base_shapes", "check_groups", "coord_check", "init_", "moe_loads", "moe_loss", "param_groups"]
__all__ += ["adapt", "compress", "convert", "densify", "distill", "fuse", "unfuse"]

_register_on_import()


def __getattr__(name: str) -> _Any:
    # compression takes a fifth of the time of the import, and few programs compress
    if name in ("compress", "compression", "distill"):
        compression = _import_module("einlinear.compression")
        return compression if name == "compression" else getattr(compression, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
