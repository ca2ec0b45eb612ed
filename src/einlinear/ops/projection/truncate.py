"""The closest matrices of a lower rank, of many matrices at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

_RESOLVED = 100.0  # how far above the rounding error of a Gram matrix must lie what is left out
_SMALL = 256  # rows up to which LAPACK, which takes one matrix after the other, gains nothing from a second core
_LARGE = 1024  # rows above which it pays to leave eigenvectors out
_FEW = (
    4  # one eigenvector in so many, or fewer: LAPACK's way to find some takes longer for each than its way to find all
)
_CHUNKS = 16  # for every core: the less memory, and the better cached
_PANEL = 512  # columns of a Gram matrix at a time


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors, of equal norms, of the closest matrix of a rank to each (Eckart and Young).

    In float64 by SVD. In float32 by the eigenvectors of M M^T, which is several times faster on a CPU; that squares the
    singular values, so that small ones drown in the rounding error of the largest. Where what is left out is not far
    above that, the SVD is taken as well. With scipy, a few eigenvectors of a large matrix are found without the others.

    Args:
        matrices: (batch, rows, columns), float32 or float64.
        rank: at most the smaller of rows and columns.

    Returns:
        (batch, rows, rank) and (batch, rank, columns), largest singular values first.
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
        torch.set_num_threads(cores)  # what threads to come start with
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def _by_gram(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """No more rows than columns."""
    gram = _gram(matrices)
    total = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)  # of all eigenvalues
    values, vectors = _largest(gram, rank)
    first = vectors.flip(2)
    second = first.mT @ matrices
    root = torch.linalg.vector_norm(second, dim=2).sqrt()
    first = first * root[:, None, :]
    second = second / root[:, :, None].clamp_min(torch.finfo(root.dtype).tiny)
    rounding = torch.finfo(values.dtype).eps * gram.shape[1] ** 0.5 * values[:, -1]
    drowned = total - values.sum(1, dtype=torch.float64) <= _RESOLVED * rounding
    if drowned.any():
        first[drowned], second[drowned] = by_svd(matrices[drowned], rank)
    return first, second


def _largest(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, ascending, and their vectors, of symmetric matrices whose lower triangles are read."""
    if gram.is_cpu and gram.shape[1] > _LARGE and _FEW * rank <= gram.shape[1] and find_spec("scipy"):
        found = [_largest_of_one(own, rank) for own in gram]
        if all(len(values) == rank for values, _ in found):
            return torch.stack([values for values, _ in found]), torch.stack([vectors for _, vectors in found])
    values, vectors = torch.linalg.eigh(gram)
    return values[:, -rank:], vectors[:, :, -rank:]


def _largest_of_one(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Without finding the others. Where values are equal up to rounding, LAPACK may miss some: then there are fewer."""
    from scipy.linalg import LinAlgError, eigh  # torch finds all or none

    rows = len(gram)
    try:
        values, vectors = eigh(gram.numpy(), subset_by_index=(rows - rank, rows - 1), driver="evr", check_finite=False)
    except LinAlgError:  # no convergence
        return gram.new_empty(0), gram.new_empty(rows, 0)
    return torch.from_numpy(values), torch.linalg.qr(torch.from_numpy(vectors))[
        0
    ]  # orthogonal also where values are close


def _gram(matrices: Tensor) -> Tensor:
    """The lower triangles of M M^T, which is all that `eigh` reads; panels at the diagonal are whole."""
    rows = matrices.shape[1]
    gram = matrices.new_zeros(len(matrices), rows, rows)
    for start in range(0, rows, _PANEL):
        gram[:, start:, start : start + _PANEL] = matrices[:, start:] @ matrices[:, start : start + _PANEL].mT
    return gram


def by_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same, always by SVD."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :rank].sqrt()
    return u[:, :, :rank] * root[:, None, :], v[:, :rank] * root[:, :, None]
