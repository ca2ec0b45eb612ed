"""Successive truncated SVDs, which split off one factor of a term after another.

The outer axes that both factors have are a batch, and the others rows and columns of a matrix whose rank is bounded.
For two factors this is optimal (Eckart and Young; Kronecker: Van Loan and Pitsianis; Monarch: arXiv 2204.00595).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.reference import einsum, term_weight
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

# rows up to which LAPACK gains nothing from a second core; chunks of matrices per core
_SMALL, _CHUNKS = 256, 16
# rows above which, and 1 / the share of the eigenvectors up to which, it pays off to compute only some of them
_LARGE, _FEW = 1024, 4
# columns of a Gram matrix that are computed at a time
_PANEL = 512


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncate the SVD of (batch, rows, columns): (batch, rows, rank) and (batch, rank, columns) of equal norms.

    float32 takes the eigenvectors of M M^T, several times faster on a CPU, unless rounding errors are too large.
    """
    if matrices.dtype == torch.float64:
        return by_svd(matrices, rank)
    if matrices.shape[1] > matrices.shape[2]:
        second, first = truncated(matrices.mT, rank)
        return first.mT, second.mT
    cores = torch.get_num_threads()
    if matrices.device.type != "cpu" or matrices.shape[1] > _SMALL or len(matrices) < 2 * cores:
        return _by_gram(matrices, rank)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(lambda part: _by_gram(part, rank), matrices.chunk(_CHUNKS * cores)))
    finally:
        # the number that new threads start with
        torch.set_num_threads(cores)
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


# a function such as `truncated`
Truncate = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def by_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute `truncated`, always by SVD."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :rank].sqrt()
    return u[:, :, :rank] * root[:, None, :], v[:, :rank] * root[:, :, None]


def _by_gram(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute `truncated` by Gram matrices, for no more rows than columns."""
    rows = matrices.shape[1]
    # lower triangles, in panels: eigensolvers read nothing else
    gram = matrices.new_zeros(len(matrices), rows, rows)
    for start in range(0, rows, _PANEL):
        gram[:, start:, start : start + _PANEL] = matrices[:, start:] @ matrices[:, start : start + _PANEL].mT
    eigenvalue_sum = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    values, vectors = _largest(gram, rank)
    first = vectors.flip(2)
    second = first.mT @ matrices
    root = torch.linalg.vector_norm(second, dim=2).sqrt()
    first = first * root[:, None, :]
    second = second / root[:, :, None].clamp_min(torch.finfo(root.dtype).tiny)
    rounding = torch.finfo(values.dtype).eps * rows**0.5 * values[:, -1]
    drowned = eigenvalue_sum - values.sum(1, dtype=torch.float64) <= 100 * rounding
    if drowned.any():
        first[drowned], second[drowned] = by_svd(matrices[drowned], rank)
    return first, second


def _largest(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, ascending, and their eigenvectors."""
    rows = gram.shape[1]
    if gram.is_cpu and rows > _LARGE and _FEW * rank <= rows and find_spec("scipy"):
        # torch computes all eigenvectors or none
        from scipy.linalg import LinAlgError, eigh

        pairs = []
        # without convergence there is no pair
        with suppress(LinAlgError):
            options = {"subset_by_index": (rows - rank, rows - 1), "driver": "evr", "check_finite": False}
            pairs = [eigh(matrix.numpy(), **options) for matrix in gram]
        # where values are equal up to rounding, LAPACK may miss some
        if pairs and all(len(values) == rank for values, _ in pairs):
            # QR makes the vectors of close values orthogonal
            vectors = torch.linalg.qr(torch.stack([torch.from_numpy(vectors) for _, vectors in pairs]))[0]
            return torch.stack([torch.from_numpy(values) for values, _ in pairs]), vectors
    values, vectors = torch.linalg.eigh(gram)
    return values[:, -rank:], vectors[:, :, -rank:]


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
    if not structure.is_padded:
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
        inner = {i: {*factor_axes} - {*axes} for i, factor_axes in remaining.items()}
        # an end of the chain first: the factor that shares rank axes with the fewest others
        index = min(inner, key=lambda i: sum(bool(inner[i] & other) for other in inner.values()))
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
            # ranks that the matrices cannot have: if both factors were zero there, they would stay zero in training
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


def outer_axes(term: Term) -> Axes:
    """The axes of the output and the input, an axis of both once."""
    return tuple(dict.fromkeys(term.outputs + term.inputs))


def unfold(w: Tensor, structure: Structure, term: Term) -> Tensor:
    """Pad a matrix with zeros and give it one dimension per outer axis; an axis of both ends keeps its diagonal."""
    sizes = dict(structure.sizes)
    axes = term.outputs + term.inputs
    inputs, outputs = structure.padding(term)
    return einsum([axes], outer_axes(term), F.pad(w, (0, inputs, 0, outputs)).reshape([sizes[a] for a in axes]))


def permute(tensor: Tensor, axes: Axes, order: Axes) -> Tensor:
    return tensor.permute([axes.index(axis) for axis in order])


def merge(tensor: Tensor, axes: Axes, groups: Sequence[Axes]) -> Tensor:
    """Permute a tensor with these axes and merge each group of axes into one dimension."""
    sizes = dict(zip(axes, tensor.shape, strict=True))
    return permute(tensor, axes, sum(groups, ())).reshape([count(group, sizes) for group in groups])


def unmerge(tensor: Tensor, groups: Sequence[Axes], order: Axes, sizes: Mapping[str, int]) -> Tensor:
    """Invert `merge`: a tensor with one dimension per group becomes one with the axes in an order."""
    axes = sum(groups, ())
    return permute(tensor.reshape([sizes[axis] for axis in axes]), axes, order)


def count(axes: Axes, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
