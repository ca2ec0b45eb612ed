"""The structured matrix closest to a given one in Frobenius norm, from the description alone.

Three ways, from the exact to the general:

- *Terms of one factor* (dense, block-diagonal, DYAD): every entry of W is shared equally among the terms that cover it.
- *Two factors* (low-rank, Kronecker, TT, Monarch, BTT, every einsum): for each value of the axes that both factors
  carry outside, a matrix of the axes of one against those of the other has the rank that the inner axes allow: its
  truncated SVD is the best there is (Eckart and Young; for Kronecker Van Loan and Pitsianis, for Monarch
  arXiv 2204.00595).
- *More factors* are split off one after another in this way, which is exact where W has the structure. What is not
  optimal then, and sums of such terms, is improved by alternating least squares: one factor at a time, until a sweep
  over all of them improves the squared error by less than TOLERANCE of it, or MAX_SWEEPS are done; fewer above 512 x
  512, and MIN_SWEEPS from 2048 x 2048 on, which costs less than 0.1 % of the error of a chain, 1 to 2 % of BLAST's.
  Sums and BLAST can end in a local optimum: up to 256 x 256 random starts are tried too.

Seconds for a Gaussian float32 matrix on one core of an AMD EPYC:

    features                       1024      4096
    btt, monarch                    0.1    2 to 6
    low_rank, kronecker      0.4 to 0.6  20 to 32
    btt(cores=3)                    0.9        21
    blast, 16 blocks, rank n/16       8        84
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.reference import dense_weight, einsum
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

TOLERANCE = 1e-7
MIN_SWEEPS, MAX_SWEEPS = 20, 300
_WORK = MAX_SWEEPS * 2**18  # entries times sweeps: all sweeps up to 512 x 512, the fewest from 2048 x 2048 on
_EXACT = 1e-13  # relative error at which there is nothing left to improve in float64
_RESTARTS = 2  # random starts beside the SVD's, where that is not known to be good
_SMALL = 2**16  # entries of a matrix up to which they are made; the SVD's start was the best of larger ones


@torch.no_grad()
def project(structure: Structure, weight: Tensor) -> list[Tensor]:
    """Factors of the best approximation of a matrix.

    Args:
        structure: what to approximate with.
        weight: (out_features, in_features), any floating dtype; float32 is used to compute where it is narrower.

    Returns:
        The factors, in the order and of the shapes of `structure.factors`, of the weight's dtype and device.

    Raises:
        ValueError: the weight has another shape, or values that are NaN or infinite.
    """
    expected = (structure.out_features, structure.in_features)
    if tuple(weight.shape) != expected:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, the structure {expected} (out, in)")
    if not weight.isfinite().all():
        raise ValueError("the weight has values that are NaN or infinite: there is nothing close to it")
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if all(len(term.factors) == 1 for term in structure.terms):
        factors = _share(structure, w)
    else:
        factors = _split_terms(structure, w)
        if not _is_optimal(structure):
            factors = _best_of_restarts(structure, w, factors)
    return [factor.to(weight.dtype).contiguous() for factor in factors]


def _share(structure: Structure, w: Tensor) -> list[Tensor]:
    """Least squares of least norm for terms of one factor: their entries are entries of W, or parts of one."""
    ones = [w.new_ones(factor.shape) for factor in structure.factors]
    shared = w / dense_weight(structure, ones).clamp(min=1)
    return [_permute(_unfold(shared, structure, term), _outer(term), term.factors[0].axes) for term in structure.terms]


def _split_terms(structure: Structure, w: Tensor) -> list[Tensor]:
    """Every term by successive SVDs, of what the terms before it have left."""
    factors: list[Tensor] = []
    for term in structure.terms:
        factors += _split(structure, term, _unfold(w - _matrix(structure, factors), structure, term))
    return factors


def _split(structure: Structure, term: Term, target: Tensor) -> list[Tensor]:
    """Factors of one term whose product is close to the target, a tensor of the term's outer axes."""
    sizes = dict(structure.sizes)
    axes = _outer(term)
    left = {index: factor.axes for index, factor in enumerate(term.factors)}
    found: dict[int, Tensor] = {}
    generator = _generator()
    while len(left) > 1:
        # the end of a chain first: the factor whose inner axes lead to the fewest others
        index = min(left, key=lambda i: _neighbours(i, left, axes))
        rest = {axis for other, carried in left.items() if other != index for axis in carried}
        mine = left.pop(index)
        batch = tuple(a for a in axes if a in mine and a in rest)
        rows = tuple(a for a in axes if a in mine and a not in rest)
        columns = tuple(a for a in axes if a not in mine)
        inner = tuple(a for a in mine if a not in axes)
        rank = _count(inner, sizes)
        matrices = _permute(target, axes, batch + rows + columns).reshape(
            _count(batch, sizes), _count(rows, sizes), _count(columns, sizes)
        )
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        root = s[:, :rank].sqrt()
        spare = max(0, rank - s.shape[1])  # ranks that these matrices cannot have
        first = F.pad(u[:, :, :rank] * root[:, None, :], (0, spare))
        second = v[:, :rank] * root[:, :, None]
        if spare:  # not zero on both sides, where no later step could bring them to life
            noise = torch.randn(second.shape[0], spare, second.shape[2], generator=generator, dtype=torch.float64)
            second = torch.cat([second, noise.to(second) * second.square().mean().sqrt()], 1)
        first = first.reshape([sizes[a] for a in batch + rows + inner])
        found[index] = _permute(first, batch + rows + inner, mine)
        axes = batch + inner + columns
        target = second.reshape([sizes[a] for a in axes])
    ((index, mine),) = left.items()
    found[index] = _permute(target, axes, mine)
    return [found[index] for index in range(len(term.factors))]


def _neighbours(index: int, left: dict[int, Axes], outer: Axes) -> int:
    inner = {axis for axis in left[index] if axis not in outer}
    return sum(bool(inner & set(axes)) for other, axes in left.items() if other != index)


def _is_optimal(structure: Structure) -> bool:
    """Whether the SVD is the best approximation: two factors, and padding that takes whole rows or columns away."""
    if len(structure.terms) > 1 or len(structure.factors) > 2:
        return False
    (term,) = structure.terms
    if not _is_padded(structure, term):
        return True
    sizes = dict(structure.sizes)
    first, second = (set(factor.axes) for factor in term.factors)
    axes = _outer(term)
    batch = tuple(a for a in axes if a in first and a in second)
    rows, columns = (tuple(a for a in axes if a not in other) for other in (second, first))
    exists = torch.ones(structure.out_features, structure.in_features)
    mask = _permute(_unfold(exists, structure, term), axes, batch + rows + columns)
    mask = mask.reshape([_count(group, sizes) for group in (batch, rows, columns)])
    return bool(torch.equal(mask, mask.amax(2, keepdim=True) * mask.amax(1, keepdim=True)))


def _best_of_restarts(structure: Structure, w: Tensor, start: list[Tensor]) -> list[Tensor]:
    """The best of alternating least squares from the SVD's factors and, while that is not exact, from random ones."""
    best, error = _alternate(structure, w, start)
    generator = _generator()
    for _ in range(_RESTARTS if _is_hard(structure) and w.numel() <= _SMALL else 0):
        if error < 1e-3:
            break
        drawn = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(w) for f in structure.factors]
        candidate, its_error = _alternate(structure, w, drawn)
        if its_error < error:
            best, error = candidate, its_error
    return best


def _generator() -> torch.Generator:
    """Random numbers of its own: the user's are not touched, and a projection can be repeated."""
    return torch.Generator().manual_seed(0)


def _is_hard(structure: Structure) -> bool:
    """Whether successive SVDs need not find a structure that is there: sums, and axes inside three factors (BLAST)."""
    if len(structure.terms) > 1:
        return True
    outer = _outer(structure.terms[0])
    carried = [axis for factor in structure.factors for axis in factor.axes if axis not in outer]
    return any(carried.count(axis) > 2 for axis in carried)


def _sweeps(w: Tensor) -> int:
    """How many sweeps may be done: fewer for larger matrices, where each is slow and the last ones gain least."""
    return min(MAX_SWEEPS, max(MIN_SWEEPS, _WORK // w.numel()))


def _alternate(structure: Structure, w: Tensor, start: list[Tensor]) -> tuple[list[Tensor], float]:
    """Alternating least squares from a start. Returns the factors and the relative error, which never grows."""
    scale = float(w.norm())
    if scale == 0:
        return [torch.zeros_like(factor) for factor in start], 0.0
    factors = list(start)
    error = float((w - _matrix(structure, factors)).norm()) / scale
    before, stretch = factors, 1.0
    for sweep in range(_sweeps(w)):
        if error < (_EXACT if w.dtype == torch.float64 else 1e-6):
            break
        swept = _sweep(structure, w, _balanced(structure, factors), damping=1e-2 * error)
        its_error = float((w - _matrix(structure, swept)).norm()) / scale
        if sweep:  # go on in the direction of the last two sweeps as long as that helps: swamps are slow otherwise
            further = [x + stretch * (x - y) for x, y in zip(swept, _balanced(structure, before))]
            error_further = float((w - _matrix(structure, further)).norm()) / scale
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
    first = 0
    for term in structure.terms:
        indices = range(first, first + len(term.factors))
        for index in indices:
            residual = _unfold(w - _matrix(structure, factors), structure, term)
            others = {i - first: factors[i] for i in indices if i != index}
            factors[index] = factors[index] + _solve(structure, term, index - first, others, residual, damping)
        first += len(term.factors)
    return factors


def _solve(
    structure: Structure, term: Term, index: int, others: dict[int, Tensor], residual: Tensor, damping: float
) -> Tensor:
    """The change of one factor that fits the residual best: small systems over its inner axes, many at once."""
    sizes = dict(structure.sizes)
    outer = _outer(term)
    mine = term.factors[index].axes
    inner = tuple(a for a in mine if a not in outer)
    rest = [(term.factors[i].axes, factor) for i, factor in others.items()] or [((), residual.new_ones(()))]
    around = {axis for axes, _ in rest for axis in axes}
    # the matrix of the normal equations takes all others twice, each time with inner axes of its own
    twice = rest + [(tuple(a if a in outer else f"{a}'" for a in axes), factor) for axes, factor in rest]
    ragged = _is_padded(structure, term)
    if ragged:
        exists = _unfold(residual.new_ones(structure.out_features, structure.in_features), structure, term)
        twice.append((outer, exists))
    batch = tuple(a for a in mine if a in outer and (a in around or ragged))
    free = tuple(a for a in mine if a in outer and a not in batch)

    n = _count(inner, sizes)
    gram = _contract(twice, batch + inner + tuple(f"{a}'" for a in inner)).reshape(-1, n, n)
    right = _contract([(outer, residual), *rest], batch + inner + free).reshape(gram.shape[0], n, -1)
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean()
    inverse = torch.linalg.pinv(gram + ridge * torch.eye(n).to(gram), hermitian=True)
    solved = (inverse @ right).reshape([sizes[a] for a in batch + inner + free])
    return _permute(solved, batch + inner + free, mine)


def _contract(operands: Sequence[tuple[Axes, Tensor]], result: Axes) -> Tensor:
    """An einsum of several tensors, two at a time: always the two whose product is smallest."""
    left = list(operands)

    def product(i: int, j: int) -> tuple[int, Axes]:
        wanted = {a for k, (axes, _) in enumerate(left) if k not in (i, j) for a in axes} | set(result)
        (mine, x), (its, y) = left[i], left[j]
        sizes = dict(zip(mine + its, x.shape + y.shape))
        kept = tuple(a for a in sizes if a in wanted)
        return _count(kept, sizes), kept

    while len(left) > 1:
        i, j = min(combinations(range(len(left)), 2), key=lambda pair: product(*pair)[0])
        _, axes = product(i, j)
        (mine, x), (its, y) = left[i], left[j]
        left = [pair for k, pair in enumerate(left) if k not in (i, j)] + [(axes, einsum([mine, its], axes, x, y))]
    ((axes, tensor),) = left
    return einsum([axes], result, tensor)


def _balanced(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same matrices by factors of equal norm within each term."""
    balanced: list[Tensor] = []
    for term in structure.terms:
        part = factors[len(balanced) : len(balanced) + len(term.factors)]
        norms = [float(factor.norm()) for factor in part]
        mean = math.prod(norms) ** (1 / len(norms))
        balanced += [factor * (mean / norm) if mean > 0 else factor for factor, norm in zip(part, norms)]
    return balanced


def _matrix(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """The sum of as many terms as there are factors for; zero for none."""
    total = torch.zeros(()) if not factors else None
    used = 0
    for term in structure.terms:
        part = factors[used : used + len(term.factors)]
        used += len(term.factors)
        if not part:
            break
        weight = dense_weight(structure, part, (term,))
        total = weight if total is None else total + weight
    assert total is not None
    return total


def _outer(term: Term) -> Axes:
    """The axes of the output and the input, an axis of both once."""
    return tuple(dict.fromkeys(term.outputs + term.inputs))


def _is_padded(structure: Structure, term: Term) -> bool:
    sizes = dict(structure.sizes)
    return (_count(term.outputs, sizes), _count(term.inputs, sizes)) != (structure.out_features, structure.in_features)


def _unfold(w: Tensor, structure: Structure, term: Term) -> Tensor:
    """W padded with zeros, a dimension per outer axis; of an axis both read and written, the diagonal."""
    sizes = dict(structure.sizes)
    size_out, size_in = _count(term.outputs, sizes), _count(term.inputs, sizes)
    tensor = F.pad(w, (0, size_in - w.shape[1], 0, size_out - w.shape[0]))
    tensor = tensor.reshape([sizes[a] for a in term.outputs + term.inputs])
    names = [f"{a} out" for a in term.outputs] + [f"{a} in" for a in term.inputs]
    for axis in term.outputs:
        if axis in term.inputs:
            first, second = names.index(f"{axis} out"), names.index(f"{axis} in")
            tensor = tensor.diagonal(dim1=first, dim2=second)
            names = [name for i, name in enumerate(names) if i not in (first, second)] + [f"{axis} out"]
    return _permute(tensor, tuple(name.split()[0] for name in names), _outer(term))


def _permute(tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    return tensor.permute([axes.index(a) for a in wanted])


def _count(axes: Axes, sizes: dict[str, int]) -> int:
    return math.prod(sizes[a] for a in axes)
