"""A term by successive SVDs: one factor after another is split off."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.projection.truncate import truncated
from einlinear.ops.projection.unfold import count, is_padded, outer_axes, permute, unfold
from einlinear.ops.reference import term_weight
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

Truncate = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # as `truncated` does it


def split_terms(structure: Structure, w: Tensor, truncate: Truncate = truncated) -> list[Tensor]:
    """The factors of every term by successive SVDs, of what the terms before it have left."""
    factors: list[Tensor] = []
    left = w
    for term in structure.terms:
        own = split(structure, term, unfold(left, structure, term), truncate)
        if term is not structure.terms[-1]:
            left = left - term_weight(structure, term, own)
        factors += own
    return factors


def is_optimal(structure: Structure) -> bool:
    """Whether the SVD is the best approximation: two factors, and padding that takes whole rows or columns away."""
    if len(structure.terms) > 1 or len(structure.factors) > 2:
        return False
    (term,) = structure.terms
    if not is_padded(structure, term):
        return True
    sizes = dict(structure.sizes)
    first, second = (set(factor.axes) for factor in term.factors)
    axes = outer_axes(term)
    batch = tuple(a for a in axes if a in first and a in second)
    rows, columns = (tuple(a for a in axes if a not in other) for other in (second, first))
    exists = torch.ones(structure.out_features, structure.in_features)
    mask = permute(unfold(exists, structure, term), axes, batch + rows + columns)
    mask = mask.reshape([count(group, sizes) for group in (batch, rows, columns)])
    return bool(torch.equal(mask, mask.amax(2, keepdim=True) * mask.amax(1, keepdim=True)))


def split(structure: Structure, term: Term, target: Tensor, truncate: Truncate = truncated) -> list[Tensor]:
    """Factors of one term whose product is close to the target, a tensor of the term's outer axes."""
    sizes = dict(structure.sizes)
    axes = outer_axes(term)
    left = {index: factor.axes for index, factor in enumerate(term.factors)}
    found: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)  # of its own: a projection can be repeated
    while len(left) > 1:
        # the end of a chain first: the factor whose inner axes lead to the fewest others
        index = min(left, key=lambda i: _neighbours(i, left, axes))
        rest = {axis for other, carried in left.items() if other != index for axis in carried}
        mine = left.pop(index)
        batch = tuple(a for a in axes if a in mine and a in rest)
        rows = tuple(a for a in axes if a in mine and a not in rest)
        columns = tuple(a for a in axes if a not in mine)
        inner = tuple(a for a in mine if a not in axes)
        rank = count(inner, sizes)
        matrices = permute(target, axes, batch + rows + columns).reshape(
            count(batch, sizes), count(rows, sizes), count(columns, sizes)
        )
        most = min(rank, *matrices.shape[1:])
        first, second = truncate(matrices, most)
        spare = rank - most  # ranks that these matrices cannot have
        first = F.pad(first, (0, spare))
        if spare:  # not zero on both sides, where no later step could bring them to life
            noise = torch.randn(second.shape[0], spare, second.shape[2], generator=generator, dtype=torch.float64)
            second = torch.cat([second, noise.to(second) * second.square().mean().sqrt()], 1)
        first = first.reshape([sizes[a] for a in batch + rows + inner])
        found[index] = permute(first, batch + rows + inner, mine)
        axes = batch + inner + columns
        target = second.reshape([sizes[a] for a in axes])
    ((index, mine),) = left.items()
    found[index] = permute(target, axes, mine)
    return [found[index] for index in range(len(term.factors))]


def _neighbours(index: int, left: dict[int, Axes], outer: Axes) -> int:
    inner = {axis for axis in left[index] if axis not in outer}
    return sum(bool(inner & set(axes)) for other, axes in left.items() if other != index)
