"""The activations of feed-forward blocks, and their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _identity(x: Tensor) -> Tensor:
    return x


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# in the order of the numbers that the compiled kernel has for them
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# functions, and classes of modules, with the defaults of their arguments
_NAMES: dict[object, str] = {
    **{function: name for name, function in ACTIVATIONS.items()},
    **{torch.relu: "relu", F.sigmoid: "sigmoid", F.tanh: "tanh"},
    **{nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"},
}


def check_activation(name: str) -> str:
    """Return the name of an activation. Raises ValueError that lists them if it is none."""
    if name not in ACTIVATIONS:
        *names, last = ACTIVATIONS
        raise ValueError(f"unknown activation {name!r}: choose {', '.join(names)} or {last}")
    return name


def name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name of a function, or of a module, if it is one of torch's own that `ACTIVATIONS` has."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    key = type(activation) if isinstance(activation, nn.Module) else activation
    try:
        return _NAMES.get(key)
    except TypeError:
        # not hashable
        return None
