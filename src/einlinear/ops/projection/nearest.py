"""`project`: which way to the closest structured matrix is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops import operands
from einlinear.ops.projection.als import best_of_restarts
from einlinear.ops.projection.svd import is_optimal, split_terms
from einlinear.ops.projection.unfold import outer_axes, permute, unfold
from einlinear.ops.projection.weighted import closest_outputs
from einlinear.ops.reference import dense_weight
from einlinear.structures import Structure
from einlinear.structures.scales import init_std

_FLOOR = 1e-6  # of the mean variance: what a direction counts at least


@torch.no_grad()
def project(
    structure: Structure, weight: Tensor, moment: Tensor | None = None, steps: int | None = None
) -> list[Tensor]:
    """Factors of the best approximation of a matrix.

    Args:
        structure: what to approximate with.
        weight: (out_features, in_features), any floating dtype; float32 is used to compute where it is narrower.
        moment: E[x x^T] of the inputs, (in_features, in_features): then the outputs for such inputs are to be closest,
            and not the weight. It may be singular: directions that never occur count as next to nothing.
        steps: at most so many of what is iterative, the descent that the moment asks for or alternating least squares;
            by default as many as pay.

    Returns:
        The factors, in the order and of the shapes of `structure.factors`, of the weight's dtype and device. Those of a
        term could be scaled against each other; here all are the same multiple of what they are at initialisation
        (`structures.mup.init_std`), so that structure-aware learning rates fit all of them.

    Raises:
        ValueError: the weight or the moment has another shape, or values that are NaN or infinite; the weight is on
            the meta device.
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
    operands.check_memory("the weight", weight)
    if not weight.isfinite().all():
        raise ValueError("the weight has values that are NaN or infinite: there is nothing close to it")
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if moment is not None and moment.any():
        factors = closest_outputs(structure, w, _definite(moment.to(w.device, torch.float64), structure), steps)
    elif all(len(term.factors) == 1 for term in structure.terms):
        factors = _share(structure, w)
    else:
        factors = split_terms(structure, w)
        if not is_optimal(structure):
            factors = best_of_restarts(structure, w, factors, steps)
    return [factor.to(weight.dtype).contiguous() for factor in _even(structure, factors)]


def _even(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same matrices by factors of which, within a term, all are equally many times as large as new ones."""
    scaled: list[Tensor] = []
    stds = init_std(structure)
    for _, numbers in structure.by_term(range(len(factors))):
        own = [factors[n] for n in numbers]
        times = [float(factor.square().mean().sqrt()) / stds[n] for n, factor in zip(numbers, own, strict=True)]
        mean = math.prod(times) ** (1 / len(times))
        scaled += [factor * (mean / size) if mean > 0 else factor for factor, size in zip(own, times, strict=True)]
    return scaled


def _definite(moment: Tensor, structure: Structure) -> Tensor:
    """The moment over its mean variance, a little of which is added to the diagonal."""
    n = structure.in_features
    if tuple(moment.shape) != (n, n):
        raise ValueError(f"the moment has shape {tuple(moment.shape)}; of {n} inputs it has ({n}, {n})")
    if not moment.isfinite().all():
        raise ValueError("the moment has values that are NaN or infinite: so had the inputs it is of")
    return moment / moment.diagonal().mean() + _FLOOR * torch.eye(n).to(moment)


def _share(structure: Structure, w: Tensor) -> list[Tensor]:
    """Least squares of least norm for terms of one factor: their entries are entries of W, or parts of one."""
    ones = [w.new_ones(factor.shape) for factor in structure.factors]
    shared = w / dense_weight(structure, ones).clamp(min=1)
    return [
        permute(unfold(shared, structure, term), outer_axes(term), term.factors[0].axes) for term in structure.terms
    ]
