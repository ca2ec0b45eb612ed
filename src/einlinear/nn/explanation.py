"""`explain`: how a layer or a feed-forward block runs on an input, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.nn.feed_forward import FeedForward
from einlinear.nn.linear import Linear
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.ops.backends import find
from einlinear.ops.context import autocast_dtype, wants_gradients
from einlinear.ops.fused_dispatch import backend_of_fused_blocks


def explain(layer: Any, x: Tensor) -> ops.Choice:
    """Explain which backend a layer uses for an input: in a training step if gradients are needed, else forward.

    Args:
        layer: an `einlinear.Linear`, or an `einlinear.FeedForward`, for which the reason says whether it runs fused or
            why not; TypeError for any other.
        x: an input of the layer, (..., in_features).

    Example:
        >>> import torch, einlinear as el
        >>> print(el.explain(el.Linear(64, 64, "btt"), torch.randn(8, 64)).backend in el.ops.BACKENDS)
        True
    """
    if not isinstance(layer, Linear | FeedForward):
        raise TypeError(f"expected an einlinear.Linear or FeedForward, not {type(layer).__name__}")
    if isinstance(layer, FeedForward):
        return _explain_block(layer, x)
    return _explain_linear(layer, x, wants_gradients(x, *layer.parameters()))


def _explain_block(block: FeedForward, x: Tensor) -> ops.Choice:
    reason = block.reason_not_to_fuse(x)
    if reason is None:
        fused = "fused: a tile of tokens passes through all layers while it is in cache"
        return _with_kernels(ops.Choice(backend_of_fused_blocks(), fused), autocast_dtype(x) or x.dtype)
    layers, training = {"up": block.up, "gate": block.gate, "down": block.down}, wants_gradients(x, *block.parameters())
    choices = {name: _explain_linear(layer, x, training) for name, layer in layers.items() if isinstance(layer, Linear)}
    first = next(iter(choices.values()), ops.Choice("reference", ""))
    backends = ", ".join(f"{name}: {choice.backend}" for name, choice in choices.items())
    return replace(first, reason=f"one layer after the other ({backends}): {reason}", estimates=(), refusals=())


def _explain_linear(layer: Linear, x: Tensor, training: bool) -> ops.Choice:
    dtype = autocast_dtype(x) or x.dtype
    why = layer.reason_to_expand(x) if isinstance(layer, QuantizedLinear) else None
    if isinstance(layer, QuantizedLinear) and why is None:
        stored = f"it multiplies with the {layer.precision} factors as they are stored"
        return _with_kernels(ops.Choice("cpu", stored), dtype)
    choice = _with_kernels(ops.choose(layer.structure, x.shape[:-1].numel(), dtype, x.device, training), dtype)
    return choice if why is None else replace(choice, reason=f"{choice.reason}; factors are expanded first, as {why}")


def _with_kernels(choice: ops.Choice, dtype: torch.dtype) -> ops.Choice:
    if choice.backend != "cpu":
        return choice
    return replace(choice, kernels=find("cpu").module.load(dtype).origin)
