"""Rounding of weights to integer formats: to nearest, or with the least change of the outputs (GPTQ).

GPTQ (Frantar et al., arXiv 2210.17323) rounds column by column, and changes the columns that are left so that they make
up for the error, given the second moment H of the inputs: tr((W - Q) H (W - Q)^T) becomes small, row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.integer_format import SCALE_DTYPE, IntegerFormat

# columns whose errors change all later columns in one product
_BLOCK = 64
# scales to try, as fractions of the scale with which no entry is clipped
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


def round_to_nearest(weight: Tensor, format: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Return int8 codes (..., rows, columns) and scales (..., rows, groups) of the entries nearest to a weight.

    The largest entry of a group gets the largest code, so no entry is clipped.

    Raises:
        ValueError: a weight with values that are NaN or infinite.

    Example:
        >>> codes, scales = round_to_nearest(torch.tensor([[1.0, -7.0, 2.4]]), IntegerFormat(4))
        >>> codes.tolist(), scales.tolist()
        ([[1, -7, 2]], [[1.0]])
    """
    _check_finite(weight, "weight")
    scales = _stored(_largest_by_group(weight, format) / format.largest)
    return _codes(weight.float(), format.by_column(scales.float(), weight.shape[-1]), format).to(torch.int8), scales


def round_to_least_error(
    weight: Tensor, second_moment: Tensor, format: IntegerFormat, damping: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """Return codes and scales, as `round_to_nearest`, that change the outputs for inputs with a second moment little.

    Args:
        weight: one matrix or a batch, (..., rows, columns).
        second_moment: E[x x^T] of the inputs, (..., columns, columns), whose batch axes may be those of the weight.
        format: bits of the codes, and the columns that share a scale.
        damping: fraction of the mean variance to add to the variance of every input.

    Raises:
        ValueError: values that are NaN or infinite, shapes that do not fit, no second moment of any inputs.

    Example:
        >>> w, x = torch.randn(4, 64), torch.randn(500, 8) @ torch.randn(8, 64)
        >>> format = IntegerFormat(3)
        >>> errors = [((format.decode(*quantised) - w) @ x.T).norm() for quantised in (
        ...     round_to_least_error(w, x.T @ x, format), round_to_nearest(w, format))]
        >>> bool(errors[0] < errors[1])
        True
    """
    _check_finite(weight, "weight")
    _check_finite(second_moment, "second moment")
    *batch, rows, columns = weight.shape
    if second_moment.shape[-2:] != (columns, columns):
        shapes = f"{tuple(second_moment.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        raise ValueError(f"a second moment of shape {shapes}: the last two sizes must be {columns}")
    if weight.numel() == 0:
        return round_to_nearest(weight, format)
    w = weight.detach().float().reshape(-1, rows, columns)
    moment = _damped(second_moment.double(), damping).expand(*batch, columns, columns).reshape(-1, columns, columns)
    variances = moment.diagonal(dim1=1, dim2=2)
    scales = _scales_of_least_error(w, variances.float()[:, None], format)
    # from the largest variance to the smallest: the most important inputs are rounded first
    order = variances.argsort(1, descending=True)
    by_column = format.by_column(scales.float(), columns).expand(-1, -1, columns)
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    by_row = order[:, None].expand_as(w)
    codes = torch.empty_like(w)
    codes.scatter_(2, by_row, _compensated(w.gather(2, by_row), by_column.gather(2, by_row), moment, format))
    return codes.to(torch.int8).view(weight.shape), scales.view(*batch, rows, -1)


def nearest_with_least_error(weight: Tensor, variances: Tensor, format: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Return codes and scales as `round_to_nearest`, but scales that may clip, for uncorrelated inputs of variances."""
    w = weight.float()
    scales = _scales_of_least_error(w, variances, format)
    return _codes(w, format.by_column(scales.float(), w.shape[-1]), format).to(torch.int8), scales


def _compensated(w: Tensor, scales: Tensor, moment: Tensor, format: IntegerFormat) -> Tensor:
    """Return the codes, column by column, each after the earlier ones' errors were made up for by the later columns."""
    # H = R R^T with an upper triangular R; the rows of its inverse say how an error is made up for
    flipped, failed = torch.linalg.cholesky_ex(moment.flip(1, 2))
    if failed.any():
        raise ValueError("the second moment is not positive semidefinite, as that of any inputs is")
    identity = torch.eye(w.shape[2]).to(moment)
    inverse = torch.linalg.solve_triangular(flipped.flip(1, 2), identity.expand_as(moment), upper=True)
    compensation = (inverse / inverse.diagonal(dim1=1, dim2=2)[:, :, None]).float()
    w, codes = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[2], _BLOCK):
        block = range(start, min(start + _BLOCK, w.shape[2]))
        errors = w.new_empty(*w.shape[:2], len(block))
        for i, column in enumerate(block):
            codes[:, :, column] = _codes(w[:, :, column], scales[:, :, column], format)
            errors[:, :, i] = w[:, :, column] - codes[:, :, column] * scales[:, :, column]
            rest = slice(column + 1, block.stop)
            w[:, :, rest] -= errors[:, :, i, None] * compensation[:, column, None, rest]
        w[:, :, block.stop :] -= errors @ compensation[:, start : block.stop, block.stop :]
    return codes


def _scales_of_least_error(w: Tensor, variances: Tensor, format: IntegerFormat) -> Tensor:
    """Return the scales, of several, with which rounding to nearest has the least error for uncorrelated inputs."""
    largest, columns = _largest_by_group(w, format), w.shape[-1]
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest, dtype=SCALE_DTYPE)
    # int8 hardly clips
    for shrink in _SHRINKS if format.bits < 8 else _SHRINKS[:1]:
        tried = _stored(shrink * largest / format.largest)
        by_column = format.by_column(tried.float(), columns)
        squares = (w - _codes(w, by_column, format) * by_column).square() * variances
        error = _by_group(squares, format).sum(-1)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(best, error)
    return scales


def _codes(w: Tensor, scales: Tensor, format: IntegerFormat) -> Tensor:
    return (w / scales).round_().clamp_(-format.largest - 1, format.largest)


def _stored(scales: Tensor) -> Tensor:
    """Return scales as they are stored; one instead of zero, so that zeros divide."""
    stored = scales.to(SCALE_DTYPE)
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def _largest_by_group(w: Tensor, format: IntegerFormat) -> Tensor:
    return _by_group(w.float().abs(), format).amax(-1)


def _by_group(w: Tensor, format: IntegerFormat) -> Tensor:
    """Return (..., rows, groups, columns of a group), with zeros in the place of missing columns."""
    columns = w.shape[-1]
    group = format.group or max(columns, 1)
    padded: Tensor = F.pad(w, (0, format.groups(columns) * group - columns))
    groups: Tensor = padded.unflatten(-1, (format.groups(columns), group))
    return groups


def _damped(moment: Tensor, damping: float) -> Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # inputs that are all zero: any code will do
    ridge = torch.where(mean > 0, max(damping, 1e-7) * mean, 1.0)
    damped: Tensor = moment + ridge * torch.eye(moment.shape[-1]).to(moment)
    return damped


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"the {name} has values that are NaN or infinite")
