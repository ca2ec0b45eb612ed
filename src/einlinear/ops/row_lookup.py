"""Rows of a structured matrix by index, without the matrix: an embedding is a product with one-hot vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.reference import einsum
from einlinear.structures import Structure, Term


def rows(structure: Structure, factors: Sequence[Tensor], indices: Tensor) -> Tensor:
    """Return W[indices], (n, in_features), for indices (n,) below out_features; differentiable in the factors.

    The index of a row is split into one index for each output axis; each factor is gathered at those of its axes.
    """
    found = [_rows_of_term(structure, *part, indices) for part in structure.by_term(factors)]
    return functools.reduce(torch.add, found)


def _rows_of_term(structure: Structure, term: Term, factors: Sequence[Tensor], rows: Tensor) -> Tensor:
    sizes = dict(structure.sizes)
    indices: dict[str, Tensor] = {}
    rest = rows
    for axis in reversed(term.outputs):
        indices[axis], rest = rest % sizes[axis], rest // sizes[axis]
    operands, subscripts = [], []
    for factor, w in zip(term.factors, factors, strict=True):
        split = [axis for axis in factor.axes if axis in indices]
        others = [axis for axis in factor.axes if axis not in indices]
        if not split:
            operands.append(w)
            subscripts.append(factor.axes)
            continue
        table = w.permute([factor.axes.index(axis) for axis in (*split, *others)])
        # lists, since torch.compile cannot trace math.prod of a generator
        table = table.reshape(math.prod([sizes[a] for a in split]), math.prod([sizes[a] for a in others]))
        index = torch.zeros_like(rows)
        for axis in split:
            index = index * sizes[axis] + indices[axis]
        operands.append(F.embedding(index, table).reshape(rows.shape[0], *[sizes[a] for a in others]))
        subscripts.append(("tokens", *others))
    # a row is zero but at its own index of an axis that the input has as well
    for axis in term.inputs:
        if axis in indices:
            operands.append(F.one_hot(indices[axis], sizes[axis]).to(operands[0].dtype))
            subscripts.append(("tokens", axis))
    row = einsum(subscripts, ("tokens", *term.inputs), *operands)
    return row.reshape(rows.shape[0], math.prod([sizes[a] for a in term.inputs]))[:, : structure.in_features]
