"""Alternating least squares: one factor at a time, the others fixed, until nothing is gained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from einlinear.ops.projection.unfold import count, is_padded, outer_axes, permute, unfold
from einlinear.ops.reference import dense_weight, einsum
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

TOLERANCE = 1e-7
MIN_SWEEPS, MAX_SWEEPS = 20, 300
_WORK = MAX_SWEEPS * 2**18  # entries times sweeps: all sweeps up to 512 x 512, the fewest from 2048 x 2048 on
_EXACT = 1e-13  # relative error at which there is nothing left to improve in float64
_RESTARTS = 2  # random starts beside the SVD's, where that is not known to be good
_SMALL = 2**16  # entries of a matrix up to which they are made; the SVD's start was the best of larger ones


def best_of_restarts(structure: Structure, w: Tensor, start: list[Tensor], sweeps: int | None = None) -> list[Tensor]:
    """The best of alternating least squares from the SVD's factors and, while that is not exact, from random ones.

    Args:
        structure: what W is approximated with.
        w: (out_features, in_features).
        start: the SVD's factors.
        sweeps: at most so many from each start; None: as many as pay.
    """
    most = _sweeps(w) if sweeps is None else min(sweeps, _sweeps(w))
    best, error = _alternate(structure, w, start, most)
    generator = torch.Generator().manual_seed(0)  # of its own: a projection can be repeated
    for _ in range(_RESTARTS if _is_hard(structure) and w.numel() <= _SMALL else 0):
        if error < 1e-3:
            break
        drawn = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(w) for f in structure.factors]
        candidate, its_error = _alternate(structure, w, drawn, most)
        if its_error < error:
            best, error = candidate, its_error
    return best


def _is_hard(structure: Structure) -> bool:
    """Whether successive SVDs need not find a structure that is there: sums, and axes inside three factors (BLAST)."""
    if len(structure.terms) > 1:
        return True
    outer = outer_axes(structure.terms[0])
    carried = [axis for factor in structure.factors for axis in factor.axes if axis not in outer]
    return any(carried.count(axis) > 2 for axis in carried)


def _sweeps(w: Tensor) -> int:
    """How many sweeps may be done: fewer for larger matrices, where each is slow and the last ones gain least."""
    return min(MAX_SWEEPS, max(MIN_SWEEPS, _WORK // w.numel()))


def _alternate(structure: Structure, w: Tensor, start: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Alternating least squares from a start. Returns the factors and the relative error, which never grows."""
    scale = float(w.norm())
    if scale == 0:
        return [torch.zeros_like(factor) for factor in start], 0.0
    factors = list(start)
    error = float((w - dense_weight(structure, factors)).norm()) / scale
    before, stretch = factors, 1.0
    for sweep in range(sweeps):
        if error < (_EXACT if w.dtype == torch.float64 else 1e-6):
            break
        swept = _sweep(structure, w, _balanced(structure, factors), damping=1e-2 * error)
        its_error = float((w - dense_weight(structure, swept)).norm()) / scale
        if sweep:  # go on in the direction of the last two sweeps as long as that helps: swamps are slow otherwise
            further = [x + stretch * (x - y) for x, y in zip(swept, _balanced(structure, before))]
            error_further = float((w - dense_weight(structure, further)).norm()) / scale
            if error_further < its_error:
                swept, its_error, stretch = further, error_further, 1.5 * stretch
            else:
                stretch = max(0.5, stretch / 2)
        if not its_error < error:
            break
        improvement = 1 - (its_error / error) ** 2
        before, factors, error = factors, swept, its_error
        if improvement < TOLERANCE:
            break
    return factors, error


def _sweep(structure: Structure, w: Tensor, factors: list[Tensor], damping: float) -> list[Tensor]:
    """Solve for every factor in turn, the others fixed; damped towards its present value."""
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
    """The change of one factor that fits the residual best: small systems over its inner axes, many at once."""
    sizes = dict(structure.sizes)
    outer = outer_axes(term)
    mine = term.factors[index].axes
    inner = tuple(a for a in mine if a not in outer)
    rest = [(term.factors[i].axes, factor) for i, factor in others.items()] or [((), residual.new_ones(()))]
    around = {axis for axes, _ in rest for axis in axes}
    # the matrix of the normal equations takes all others twice, each time with inner axes of its own
    twice = rest + [(tuple(a if a in outer else f"{a}'" for a in axes), factor) for axes, factor in rest]
    ragged = is_padded(structure, term)
    if ragged:
        exists = unfold(residual.new_ones(structure.out_features, structure.in_features), structure, term)
        twice.append((outer, exists))
    batch = tuple(a for a in mine if a in outer and (a in around or ragged))
    free = tuple(a for a in mine if a in outer and a not in batch)

    n = count(inner, sizes)
    gram = _contract(twice, batch + inner + tuple(f"{a}'" for a in inner)).reshape(-1, n, n)
    right = _contract([(outer, residual), *rest], batch + inner + free).reshape(gram.shape[0], n, -1)
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean()
    inverse = torch.linalg.pinv(gram + ridge * torch.eye(n).to(gram), hermitian=True)
    solved = (inverse @ right).reshape([sizes[a] for a in batch + inner + free])
    return permute(solved, batch + inner + free, mine)


def _contract(operands: Sequence[tuple[Axes, Tensor]], result: Axes) -> Tensor:
    """An einsum of several tensors, two at a time: always the two whose product is smallest."""
    left = list(operands)

    def product(i: int, j: int) -> tuple[int, Axes]:
        wanted = {a for k, (axes, _) in enumerate(left) if k not in (i, j) for a in axes} | set(result)
        (mine, x), (its, y) = left[i], left[j]
        sizes = dict(zip(mine + its, x.shape + y.shape))
        kept = tuple(a for a in sizes if a in wanted)
        return count(kept, sizes), kept

    while len(left) > 1:
        i, j = min(combinations(range(len(left)), 2), key=lambda pair: product(*pair)[0])
        _, axes = product(i, j)
        (mine, x), (its, y) = left[i], left[j]
        left = [pair for k, pair in enumerate(left) if k not in (i, j)] + [(axes, einsum([mine, its], axes, x, y))]
    ((axes, tensor),) = left
    return einsum([axes], result, tensor)


def _balanced(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same matrices by factors of equal norm within each term."""
    return [factor for _, own in structure.by_term(factors) for factor in of_equal_norm(own)]


def of_equal_norm(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors of one term, scaled so that their product stays the same."""
    norms = [float(torch.linalg.vector_norm(factor)) for factor in factors]
    mean = math.prod(norms) ** (1 / len(norms))
    return [factor * (mean / norm) if mean > 0 else factor for factor, norm in zip(factors, norms, strict=True)]
