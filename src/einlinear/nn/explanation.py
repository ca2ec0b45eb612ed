"""Explanation of the backend that a layer uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from einlinear import ops
from einlinear.nn.linear import Linear
from einlinear.ops.context import autocast_dtype, wants_gradients


def explain(layer: Any, x: Tensor) -> ops.Choice:
    """Explain which backend a layer uses for an input: in a training step if gradients are needed, else forward.

    Args:
        layer: an `einlinear.Linear`.
        x: an input of the layer, (..., in_features).

    Raises:
        TypeError: `layer` is not an `einlinear.Linear`.

    Example:
        >>> import torch, einlinear as el
        >>> print(el.explain(el.Linear(64, 64, "btt"), torch.randn(8, 64)).backend in el.ops.BACKENDS)
        True
    """
    if not isinstance(layer, Linear):
        raise TypeError(f"expected an einlinear.Linear, not {type(layer).__name__}")
    training = wants_gradients(x, *layer.parameters())
    tokens = x.numel() // layer.in_features
    return ops.choose(layer.structure, tokens, autocast_dtype(x) or x.dtype, x.device, training)
