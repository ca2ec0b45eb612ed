"""Factors as batches of matrices: the form in which they are multiplied, and rounded row by row."""

from __future__ import annotations

from torch import Tensor

from einlinear.ops.projection.svd import merge, unmerge
from einlinear.structures import Factor


def as_matrices(factor: Factor, tensor: Tensor) -> Tensor:
    """Return a factor as matrices, (batch, new, contracted)."""
    return merge(tensor, factor.axes, (factor.batch, factor.new, factor.contracted))


def from_matrices(factor: Factor, matrices: Tensor) -> Tensor:
    """Invert `as_matrices`."""
    groups = (factor.batch, factor.new, factor.contracted)
    return unmerge(matrices, groups, factor.axes, dict(zip(factor.axes, factor.shape, strict=True)))
