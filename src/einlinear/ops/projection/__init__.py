"""`project`: the structured matrix closest to a given one, in Frobenius norm or in its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from einlinear.ops.operands import check_memory
from einlinear.ops.projection.als import best_of_restarts, equalized
from einlinear.ops.projection.svd import is_optimal, outer_axes, permute, split_terms, unfold
from einlinear.ops.projection.weighted import closest_outputs
from einlinear.ops.reference import dense_weight
from einlinear.structures import Structure
from einlinear.structures.initialization import init_std

__all__ = ["project"]


@torch.no_grad()
def project(
    structure: Structure, weight: Tensor, second_moment: Tensor | None = None, steps: int | None = None
) -> list[Tensor]:
    """Factors of the best approximation of a matrix.

    Args:
        structure: the structure of the approximation.
        weight: (out_features, in_features), of any floating dtype; the computation is in float32 or wider.
        second_moment: E[x x^T] of the inputs, (in_features, in_features), perhaps singular. With it, the error of the
            outputs for such inputs is minimised instead of the error of the weight.
        steps: the maximum number of iterations; by default as many as pay off.

    Returns:
        The factors, as `structure.factors` says, of the weight's dtype and device. Those of a term are at the same
        multiple of their scale at initialisation, so that structure-aware learning rates fit all.

    Raises:
        ValueError: a weight or second moment of a wrong shape, or with NaN or infinite values; a weight on "meta".
        TypeError: a weight of integers, as quantized ones are.
        RuntimeError: the memory of the weight was released.
    """
    expected = (structure.out_features, structure.in_features)
    if tuple(weight.shape) != expected:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, the structure {expected} (out, in)")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"a weight of {weight.dtype} cannot be projected: dequantize it, or convert it to float")
    if weight.is_meta:
        raise ValueError("a weight on the meta device has no values to project: load it first")
    check_memory("the weight", weight)
    if not weight.isfinite().all():
        raise ValueError("the weight has values that are NaN or infinite: there is nothing close to it")
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if second_moment is not None and second_moment.any():
        definite = _definite(second_moment.to(w.device, torch.float64), structure.in_features)
        factors = closest_outputs(structure, w, definite, steps)
    elif all(len(term.factors) == 1 for term in structure.terms):
        # each entry of W is shared among the terms that have it
        ones = [w.new_ones(factor.shape) for factor in structure.factors]
        shared = w / dense_weight(structure, ones).clamp(min=1)
        factors = [permute(unfold(shared, structure, t), outer_axes(t), t.factors[0].axes) for t in structure.terms]
    else:
        factors = split_terms(structure, w)
        if not is_optimal(structure):
            factors = best_of_restarts(structure, w, factors, steps)
    stds = zip(factors, init_std(structure), strict=True)
    multiples = [float(factor.square().mean().sqrt()) / std for factor, std in stds]
    return [factor.to(weight.dtype).contiguous() for factor in equalized(structure, factors, multiples)]


def _definite(second_moment: Tensor, n: int) -> Tensor:
    """The second moment, scaled to a mean variance of 1 and made positive definite."""
    if tuple(second_moment.shape) != (n, n):
        raise ValueError(f"the second moment has shape {tuple(second_moment.shape)}, not ({n}, {n})")
    if not second_moment.isfinite().all():
        raise ValueError("the second moment has values that are NaN or infinite: check the inputs it was computed from")
    scaled = second_moment / second_moment.diagonal().mean()
    scaled.diagonal().add_(1e-6)
    return scaled
