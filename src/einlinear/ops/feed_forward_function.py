"""`feed_forward`, a feed-forward block in one call: one layer after the other, until the kernel is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.activation_functions import ACTIVATIONS
from einlinear.ops.context import forced
from einlinear.ops.feed_forward_block import Weights
from einlinear.ops.linear_function import linear
from einlinear.structures import Structure


def feed_forward(
    x: Tensor,
    up: Weights,
    down: Weights,
    gate: Weights | None = None,
    activation: str = "gelu",
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    def layer(weights: Weights, source: Tensor) -> Tensor:
        return linear(weights.structure, weights.factors, source, weights.bias, backend)

    hidden = layer(up, x)
    hidden = ACTIVATIONS[activation](hidden) if gate is None else ACTIVATIONS[activation](layer(gate, x)) * hidden
    y = layer(down, hidden)
    return y + x if residual else y


def reason_not_to_fuse(
    structures: Sequence[Structure],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
    backend: str | None = None,
) -> str | None:
    backend = backend or forced().backend
    if backend not in (None, "cpu"):
        return f"the backend {backend!r} is forced, which has no fused blocks"
    return None if backend == "cpu" or tokens >= 16 else "fewer than 16 tokens are faster layer by layer"
