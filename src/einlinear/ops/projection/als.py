"""Alternating least squares: one factor at a time, the others fixed, until the error stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from einlinear.ops.projection.svd import count, merge, outer_axes, unfold, unmerge
from einlinear.ops.reference import dense_weight, einsum
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

# the number of sweeps, limited by entries times sweeps: fewer cost up to 0.1 % of a chain's error, 2 % of BLAST's
_MIN_SWEEPS, _MAX_SWEEPS, _WORK = 20, 300, 300 * 2**18
# random starts besides the SVD's, where that may be bad, and the entries of a matrix up to which they help
_RESTARTS, _SMALL = 2, 2**16


def best_of_restarts(structure: Structure, w: Tensor, start: list[Tensor], sweeps: int | None = None) -> list[Tensor]:
    """Improve the SVD's factors and, where they may end in a local optimum, random ones. Return the best."""
    max_sweeps = _sweeps(w) if sweeps is None else min(sweeps, _sweeps(w))
    best, error = _alternate(structure, w, start, max_sweeps)
    # a generator of its own, so that a projection is reproducible
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RESTARTS if _is_hard(structure) and w.numel() <= _SMALL else 0):
        if error < 1e-3:
            break
        drawn = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(w) for f in structure.factors]
        candidate, candidate_error = _alternate(structure, w, drawn, max_sweeps)
        if candidate_error < error:
            best, error = candidate, candidate_error
    return best


def _is_hard(structure: Structure) -> bool:
    """Return whether successive SVDs may miss the best matrix: for sums, and rank axes of three factors (BLAST)."""
    outer = outer_axes(structure.terms[0])
    rank_axes = [axis for factor in structure.factors for axis in factor.axes if axis not in outer]
    return len(structure.terms) > 1 or any(rank_axes.count(axis) > 2 for axis in rank_axes)


def _sweeps(w: Tensor) -> int:
    return min(_MAX_SWEEPS, max(_MIN_SWEEPS, _WORK // w.numel()))


def _alternate(structure: Structure, w: Tensor, start: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Improve factors. Return them and the relative error, which never grows."""
    scale = float(w.norm())
    if scale == 0:
        return [torch.zeros_like(factor) for factor in start], 0.0

    def error_of(factors: Sequence[Tensor]) -> float:
        return float((w - dense_weight(structure, factors)).norm()) / scale

    factors = previous = start
    error, stretch = error_of(start), 1.0
    for sweep in range(sweeps):
        # nothing is left to improve
        if error < (1e-13 if w.dtype == torch.float64 else 1e-6):
            break
        swept = _sweep(structure, w, equalized(structure, factors), damping=1e-2 * error)
        swept_error = error_of(swept)
        if sweep:
            # Extrapolate the last two sweeps as long as that helps, since sweeps in swamps are slow.
            further = [x + stretch * (x - y) for x, y in zip(swept, equalized(structure, previous))]
            further_error = error_of(further)
            if further_error < swept_error:
                swept, swept_error, stretch = further, further_error, 1.5 * stretch
            else:
                stretch = max(0.5, stretch / 2)
        if not swept_error < error:
            break
        # of the squared error
        improvement = 1 - (swept_error / error) ** 2
        previous, factors, error = factors, swept, swept_error
        if improvement < 1e-7:
            break
    return factors, error


def _sweep(structure: Structure, w: Tensor, factors: list[Tensor], damping: float) -> list[Tensor]:
    """Solve for every factor in turn, the others fixed, damped towards its current value."""
    factors = list(factors)
    for term, numbers in structure.by_term(range(len(factors))):
        for index, number in enumerate(numbers):
            residual = unfold(w - dense_weight(structure, factors), structure, term)
            others = {i: factors[n] for i, n in enumerate(numbers) if n != number}
            factors[number] = factors[number] + _solve(structure, term, index, others, residual, damping)
    return factors


def _solve(
    structure: Structure, term: Term, index: int, others: dict[int, Tensor], residual: Tensor, damping: float
) -> Tensor:
    """The change of one factor that fits the residual best: small systems over its rank axes, many at once."""
    sizes, outer, axes = dict(structure.sizes), outer_axes(term), term.factors[index].axes
    rank_axes = tuple(a for a in axes if a not in outer)
    rest = [(term.factors[i].axes, factor) for i, factor in others.items()] or [((), residual.new_ones(()))]
    shared = {axis for rest_axes, _ in rest for axis in rest_axes}
    # the matrix of the normal equations has all others twice, each time with separate rank axes
    twice = rest + [(tuple(a if a in outer else f"{a}'" for a in rest_axes), factor) for rest_axes, factor in rest]
    padded = structure.padding(term) != (0, 0)
    if padded:
        ones = residual.new_ones(structure.out_features, structure.in_features)
        twice.append((outer, unfold(ones, structure, term)))
    batch = tuple(a for a in axes if a in outer and (a in shared or padded))
    free = tuple(a for a in axes if a in outer and a not in batch)
    groups, n = (batch, rank_axes, free), count(rank_axes, sizes)
    gram = contract(twice, batch + rank_axes + tuple(f"{a}'" for a in rank_axes)).reshape(-1, n, n)
    right = merge(contract([(outer, residual), *rest], sum(groups, ())), sum(groups, ()), groups)
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean()
    inverse = torch.linalg.pinv(gram + ridge * torch.eye(n).to(gram), hermitian=True)
    return unmerge(inverse @ right, groups, axes, sizes)


def contract(operands: Sequence[tuple[Axes, Tensor]], result: Axes) -> Tensor:
    """An einsum of several tensors, two at a time: always the two whose product is smallest."""
    remaining = list(operands)
    while len(remaining) > 1:
        products: list[tuple[int, int, int, Axes]] = []
        for i, j in combinations(range(len(remaining)), 2):
            needed = {a for k, (axes, _) in enumerate(remaining) if k not in (i, j) for a in axes} | set(result)
            (first, x), (second, y) = remaining[i], remaining[j]
            sizes = dict(zip(first + second, x.shape + y.shape))
            axes = tuple(a for a in sizes if a in needed)
            products.append((count(axes, sizes), i, j, axes))
        _, i, j, axes = min(products)
        # the second first, so that the first keeps its position
        (second, y), (first, x) = remaining.pop(j), remaining.pop(i)
        remaining.append((axes, einsum([first, second], axes, x, y)))
    ((axes, tensor),) = remaining
    return einsum([axes], result, tensor)


def equalized(structure: Structure, factors: Sequence[Tensor], norms: Sequence[float] = ()) -> list[Tensor]:
    """Scale the factors of each term so that these norms, by default their own, become equal. Their product stays."""
    norms = norms or [float(torch.linalg.vector_norm(factor)) for factor in factors]
    scaled: list[Tensor] = []
    for _, pairs in structure.by_term(list(zip(factors, norms, strict=True))):
        mean = math.prod(norm for _, norm in pairs) ** (1 / len(pairs))
        scaled += [factor * (mean / norm) if mean > 0 else factor for factor, norm in pairs]
    return scaled
