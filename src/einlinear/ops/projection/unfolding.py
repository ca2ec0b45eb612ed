"""Reshaping of a matrix into a tensor of the axes of a term, and of tensors into batches of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.reference import einsum
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes


def outer_axes(term: Term) -> Axes:
    """The axes of the output and the input, an axis of both once."""
    return tuple(dict.fromkeys(term.outputs + term.inputs))


def is_padded(structure: Structure, term: Term) -> bool:
    """Return whether a term has more inputs or outputs than the matrix."""
    sizes = dict(structure.sizes)
    return (count(term.outputs, sizes), count(term.inputs, sizes)) != (structure.out_features, structure.in_features)


def unfold(w: Tensor, structure: Structure, term: Term) -> Tensor:
    """Pad a matrix with zeros and give it one dimension per outer axis; an axis of both ends keeps its diagonal."""
    sizes = dict(structure.sizes)
    axes = term.outputs + term.inputs
    padding = (0, count(term.inputs, sizes) - w.shape[1], 0, count(term.outputs, sizes) - w.shape[0])
    return einsum([axes], outer_axes(term), F.pad(w, padding).reshape([sizes[a] for a in axes]))


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
