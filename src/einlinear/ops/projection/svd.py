"""Approximation by successive SVDs, which split off one factor of a term after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.projection.truncate import truncated
from einlinear.ops.projection.unfolding import count, is_padded, merge, outer_axes, permute, unfold, unmerge
from einlinear.ops.reference import term_weight
from einlinear.structures import Structure, Term

# a function such as `truncated`
Truncate = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def split_terms(structure: Structure, w: Tensor, truncate: Truncate = truncated) -> list[Tensor]:
    """Factors of all terms. Each term approximates the residual of the terms before it."""
    factors: list[Tensor] = []
    residual = w
    for term in structure.terms:
        term_factors = split(structure, term, unfold(residual, structure, term), truncate)
        if term is not structure.terms[-1]:
            residual = residual - term_weight(structure, term, term_factors)
        factors += term_factors
    return factors


def is_optimal(structure: Structure) -> bool:
    """Return whether the SVD is the best approximation: two factors, and padding that removes full rows or columns."""
    if len(structure.terms) > 1 or len(structure.factors) > 2:
        return False
    (term,) = structure.terms
    if not is_padded(structure, term):
        return True
    first, second = (set(factor.axes) for factor in term.factors)
    axes = outer_axes(term)
    batch = tuple(a for a in axes if a in first and a in second)
    rows, columns = (tuple(a for a in axes if a not in other) for other in (second, first))
    ones = torch.ones(structure.out_features, structure.in_features)
    mask = merge(unfold(ones, structure, term), axes, (batch, rows, columns))
    return bool(torch.equal(mask, mask.amax(2, keepdim=True) * mask.amax(1, keepdim=True)))


def split(structure: Structure, term: Term, target: Tensor, truncate: Truncate = truncated) -> list[Tensor]:
    """Factors of one term whose product is close to the target, a tensor of the term's outer axes."""
    sizes = dict(structure.sizes)
    axes = outer_axes(term)
    remaining = {index: factor.axes for index, factor in enumerate(term.factors)}
    factors: dict[int, Tensor] = {}
    # a generator of its own, so that a projection is reproducible
    generator = torch.Generator().manual_seed(0)
    while len(remaining) > 1:
        # an end of the chain first: the factor that shares rank axes with the fewest others
        index = min(
            remaining, key=lambda i: sum(bool({*remaining[i]} & {*other} - {*axes}) for other in remaining.values())
        )
        factor_axes = remaining.pop(index)
        others = {axis for other in remaining.values() for axis in other}
        batch = tuple(a for a in axes if a in factor_axes and a in others)
        rows = tuple(a for a in axes if a in factor_axes and a not in others)
        columns = tuple(a for a in axes if a not in factor_axes)
        rank_axes = tuple(a for a in factor_axes if a not in axes)
        matrices = merge(target, axes, (batch, rows, columns))
        rank = count(rank_axes, sizes)
        possible = min(rank, *matrices.shape[1:])
        first, second = truncate(matrices, possible)
        if rank > possible:
            # The matrices cannot have the other ranks. They are zero in one factor only: if they were zero in both,
            # gradients and least squares would leave them at zero.
            first = F.pad(first, (0, rank - possible))
            shape = second.shape[0], rank - possible, second.shape[2]
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            second = torch.cat([second, noise.to(second) * second.square().mean().sqrt()], 1)
        factors[index] = unmerge(first, (batch, rows, rank_axes), factor_axes, sizes)
        axes = batch + rank_axes + columns
        target = second.reshape([sizes[a] for a in axes])
    ((index, factor_axes),) = remaining.items()
    factors[index] = permute(target, axes, factor_axes)
    return [factors[index] for index in range(len(term.factors))]
