"""How a structured product is run: a reference, and executors that must agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops import contraction, reference
from einlinear.ops.project import project
from einlinear.ops.reference import dense_weight
from einlinear.structures import Structure

__all__ = ["EXECUTORS", "dense_weight", "linear", "project"]

EXECUTORS = ("contraction", "reference")


def linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    executor: str | None = None,
) -> Tensor:
    """The structured counterpart of `torch.nn.functional.linear`.

    Args:
        structure: what the matrix is.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`.
        x: (..., in_features), of the same dtype as the factors (or under autocast).
        bias: (out_features,) or None.
        executor: "contraction" (batched matmuls with their own backward), "reference" (plain einsum), or None: the
            former where it copies no activation, the latter otherwise and where a compiler fuses the operators itself.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: x has another number of features, as `torch.nn.functional.linear` does.
        ValueError: an unknown executor.
    """
    if executor is None:
        eager = not torch.compiler.is_compiling()
        executor = "contraction" if eager and contraction.copy_free(structure) else "reference"
    if executor not in EXECUTORS:
        raise ValueError(f"unknown executor {executor!r}: choose {' or '.join(EXECUTORS)}")
    if x.dim() == 0 or x.shape[-1] != structure.in_features:
        raise RuntimeError(
            f"the input has shape {tuple(x.shape)}, but its last dimension must be in_features={structure.in_features}"
        )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
        bias = None if bias is None else bias.to(dtype)
    tokens = x.reshape(-1, structure.in_features)
    if executor == "contraction":
        y = contraction.apply(structure, factors, tokens, bias)
    else:
        y = reference.apply(structure, factors, tokens)
        y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], structure.out_features)
