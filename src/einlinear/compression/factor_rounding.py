"""Rounding of a layer's factors, one after the other: each later one makes up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.compression.rounding import round_to_least_error, round_to_nearest
from einlinear.ops.factor_matrices import as_matrices, from_matrices
from einlinear.ops.integer_format import IntegerFormat
from einlinear.ops.projection.svd import merge
from einlinear.ops.projection.weighted import best_last_factor
from einlinear.ops.reference import einsum
from einlinear.structures import Factor, Structure


@torch.no_grad()
def round_factors(
    s: Structure,
    factors: Sequence[Tensor],
    formats: Sequence[IntegerFormat | None],
    weight: Tensor | None = None,
    second_moment: Tensor | None = None,
) -> list[tuple[Tensor, Tensor] | Tensor]:
    """Return codes and scales of each factor as matrices, or the factor in bfloat16 where the format is None.

    Args:
        s: the structure; "dense" has one factor, the weight.
        factors: fitted to the weight.
        formats: one for each factor.
        weight: (out_features, in_features), to which the last factor is fitted again once the others are rounded.
        second_moment: E[x x^T] of the inputs, positive definite; None rounds every factor to nearest.
    """
    quantized: list[tuple[Tensor, Tensor] | Tensor] = []
    for term, pairs in s.by_term(list(zip(factors, formats, strict=True))):
        exact, rounded = [factor.float() for factor, _ in pairs], list[Tensor]()
        # inputs with this second moment, as many as features
        z = None if second_moment is None or weight is None else _inputs(s, term.inputs, second_moment)
        for step, (factor, (_, format)) in enumerate(zip(term.factors, pairs, strict=True)):
            if weight is not None and second_moment is not None and 0 < step == len(term.factors) - 1:
                again = best_last_factor(s, weight.float(), second_moment.float(), rounded)
                exact[step] = exact[step] if again is None else again
            quantized.append(_rounded(factor, exact[step], format, z))
            rounded.append(expanded(factor, quantized[-1], format))
            if z is not None:
                z = einsum([("tokens", *factor.source), factor.axes], ("tokens", *factor.result), z, rounded[-1])
    return quantized


def expanded(factor: Factor, quantized: tuple[Tensor, Tensor] | Tensor, format: IntegerFormat | None) -> Tensor:
    """Return a factor in float32."""
    if isinstance(quantized, Tensor):
        return quantized.float()
    assert format is not None
    return from_matrices(factor, format.decode(*quantized))


def _rounded(
    factor: Factor, tensor: Tensor, format: IntegerFormat | None, z: Tensor | None
) -> tuple[Tensor, Tensor] | Tensor:
    if format is None:
        return tensor.bfloat16()
    matrices = as_matrices(factor, tensor)
    if z is None:
        return round_to_nearest(matrices, format)
    groups = (factor.batch, ("tokens", *factor.free), factor.contracted)
    inputs = merge(z, ("tokens", *factor.source), groups)
    return round_to_least_error(matrices, inputs.mT @ inputs, format)


def _inputs(s: Structure, axes: Sequence[str], second_moment: Tensor) -> Tensor:
    sizes = dict(s.sizes)
    root = torch.linalg.cholesky(second_moment.double()).T.float()
    shape = [sizes[axis] for axis in axes]
    return F.pad(root, (0, torch.Size(shape).numel() - s.in_features)).reshape(-1, *shape)
