"""Closest matrices of a lower rank, for many matrices at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

# The truncated eigenvalues must be this many times as large as the rounding error of a Gram matrix.
_RESOLVED = 100.0
# rows up to which LAPACK, which takes one matrix after the other, gains nothing from a second core
_SMALL = 256
# rows above which, and 1 / the share of the eigenvectors up to which, it pays off to compute only some of them
_LARGE, _FEW = 1024, 4
# chunks of matrices per core: more of them take less memory and are cached better
_CHUNKS = 16
# columns of a Gram matrix that are computed at a time
_PANEL = 512


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncate the SVD of each matrix: two factors of equal norms of the closest matrix of a rank (Eckart and Young).

    float64 takes the SVD. float32 takes the eigenvectors of M M^T, which is several times faster on a CPU. That squares
    the singular values, so small ones drown in the rounding error of the largest. If the truncated ones are not far
    above that error, the SVD is taken as well. With scipy, a few eigenvectors of a large matrix are computed alone.

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
        # the number that new threads start with
        torch.set_num_threads(cores)
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def _by_gram(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute `truncated` by Gram matrices, for no more rows than columns."""
    gram = _gram(matrices)
    eigenvalue_sum = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    values, vectors = _largest(gram, rank)
    first = vectors.flip(2)
    second = first.mT @ matrices
    root = torch.linalg.vector_norm(second, dim=2).sqrt()
    first = first * root[:, None, :]
    second = second / root[:, :, None].clamp_min(torch.finfo(root.dtype).tiny)
    rounding = torch.finfo(values.dtype).eps * gram.shape[1] ** 0.5 * values[:, -1]
    drowned = eigenvalue_sum - values.sum(1, dtype=torch.float64) <= _RESOLVED * rounding
    if drowned.any():
        first[drowned], second[drowned] = by_svd(matrices[drowned], rank)
    return first, second


def _largest(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, ascending, and their eigenvectors. Only lower triangles are read."""
    if gram.is_cpu and gram.shape[1] > _LARGE and _FEW * rank <= gram.shape[1] and find_spec("scipy"):
        pairs = [_largest_of_one(matrix, rank) for matrix in gram]
        if all(len(values) == rank for values, _ in pairs):
            return torch.stack([values for values, _ in pairs]), torch.stack([vectors for _, vectors in pairs])
    values, vectors = torch.linalg.eigh(gram)
    return values[:, -rank:], vectors[:, :, -rank:]


def _largest_of_one(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same of one matrix, without the others. If values are equal up to rounding, LAPACK may miss some."""
    # torch computes all eigenvectors or none
    from scipy.linalg import LinAlgError, eigh

    rows = len(gram)
    try:
        values, vectors = eigh(gram.numpy(), subset_by_index=(rows - rank, rows - 1), driver="evr", check_finite=False)
    except LinAlgError:
        # no convergence
        return gram.new_empty(0), gram.new_empty(rows, 0)
    # QR makes the vectors of close values orthogonal
    return torch.from_numpy(values), torch.linalg.qr(torch.from_numpy(vectors))[0]


def _gram(matrices: Tensor) -> Tensor:
    """The lower triangles of M M^T, in panels: `eigh` reads nothing else."""
    rows = matrices.shape[1]
    gram = matrices.new_zeros(len(matrices), rows, rows)
    for start in range(0, rows, _PANEL):
        gram[:, start:, start : start + _PANEL] = matrices[:, start:] @ matrices[:, start : start + _PANEL].mT
    return gram


def by_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute `truncated`, always by SVD."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :rank].sqrt()
    return u[:, :, :rank] * root[:, None, :], v[:, :rank] * root[:, :, None]
