"""A matrix as a tensor of the axes of a term."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes


def outer_axes(term: Term) -> Axes:
    """The axes of the output and the input, an axis of both once."""
    return tuple(dict.fromkeys(term.outputs + term.inputs))


def is_padded(structure: Structure, term: Term) -> bool:
    sizes = dict(structure.sizes)
    return (count(term.outputs, sizes), count(term.inputs, sizes)) != (structure.out_features, structure.in_features)


def unfold(w: Tensor, structure: Structure, term: Term) -> Tensor:
    """W padded with zeros, a dimension per outer axis; of an axis both read and written, the diagonal."""
    sizes = dict(structure.sizes)
    size_out, size_in = count(term.outputs, sizes), count(term.inputs, sizes)
    tensor = F.pad(w, (0, size_in - w.shape[1], 0, size_out - w.shape[0]))
    tensor = tensor.reshape([sizes[a] for a in term.outputs + term.inputs])
    names = [f"{a} out" for a in term.outputs] + [f"{a} in" for a in term.inputs]
    for axis in term.outputs:
        if axis in term.inputs:
            first, second = names.index(f"{axis} out"), names.index(f"{axis} in")
            tensor = tensor.diagonal(dim1=first, dim2=second)
            names = [name for i, name in enumerate(names) if i not in (first, second)] + [f"{axis} out"]
    return permute(tensor, tuple(name.split()[0] for name in names), outer_axes(term))


def permute(tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    return tensor.permute([axes.index(a) for a in wanted])


def count(axes: Axes, sizes: dict[str, int]) -> int:
    return math.prod(sizes[a] for a in axes)
