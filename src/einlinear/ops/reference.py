"""The reference: plain einsum, one factor after the other, correct by inspection."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.operands import Operands
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes


def apply(operands: Operands) -> Tensor:
    """Return y of shape (n, out_features), in plain operators."""
    structure, factors, x, bias, routing = operands
    if routing is None:
        y = _contract(structure, factors, x)
    else:
        y = x.new_zeros(x.shape[0], structure.out_features)
        for e, expert in enumerate(zip(*(factor.unbind() for factor in factors), strict=True)):
            # every expert multiplies all tokens, with a gate of zero for those that are not routed to it
            gate = torch.where(routing.indices == e, routing.gates, 0).sum(1, keepdim=True, dtype=routing.gates.dtype)
            y = y + gate * _contract(structure, expert, x)
    return y if bias is None else y + bias


def _contract(structure: Structure, factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Contract x of shape (n, in_features) with one factor after the other, term by term."""
    sizes = dict(structure.sizes)
    outputs = []
    for term, term_factors in structure.by_term(factors):
        # sizes come from the structure, since those of tensors are no numbers while something traces
        padding, surplus = structure.padding(term)
        z = (F.pad(x, (0, padding)) if padding else x).reshape(x.shape[0], *[sizes[a] for a in term.inputs])
        for factor, w in zip(term.factors, term_factors):
            z = einsum([("tokens", *factor.source), factor.axes], ("tokens", *factor.result), z, w)
        last = term.factors[-1].result
        z = z.permute([0, *[1 + last.index(a) for a in term.outputs]])
        z = z.reshape(x.shape[0], structure.out_features + surplus)
        outputs.append(z[:, : structure.out_features] if surplus else z)
    return functools.reduce(torch.add, outputs)


def dense_weight(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """Return W of shape (out_features, in_features): the sum of the weights of all terms."""
    return functools.reduce(torch.add, [term_weight(structure, *part) for part in structure.by_term(factors)])


def term_weight(structure: Structure, term: Term, factors: Sequence[Tensor]) -> Tensor:
    """Return the weight of one term, of the shape of W: its factors in a single einsum."""
    sizes = dict(structure.sizes)
    operands = list(factors)
    subscripts = [factor.axes for factor in term.factors]
    outputs = []
    for axis in term.outputs:
        # an axis of both input and output is a diagonal: einsum writes it with an identity
        if axis in term.inputs:
            operands.append(torch.eye(sizes[axis], dtype=operands[0].dtype, device=operands[0].device))
            subscripts.append((axis, f"{axis}'"))
        outputs.append(f"{axis}'" if axis in term.inputs else axis)
    weight = einsum(subscripts, (*outputs, *term.inputs), *operands)
    # lists, since torch.compile cannot trace math.prod of a generator
    weight = weight.reshape(math.prod([sizes[a] for a in term.outputs]), math.prod([sizes[a] for a in term.inputs]))
    return weight[: structure.out_features, : structure.in_features]


def pad(x: Tensor, features: int) -> Tensor:
    """Append zeros to the last dimension of x until it has this many features."""
    return F.pad(x, (0, features - x.shape[-1])) if features > x.shape[-1] else x


def einsum(subscripts: Sequence[Axes], result: Axes, *operands: Tensor) -> Tensor:
    """Call torch.einsum with axes of any name; every axis of the result must be one of an operand."""
    names = dict.fromkeys(axis for axes in (*subscripts, result) for axis in axes)
    letter = dict(zip(names, string.ascii_letters, strict=False))
    text = ",".join("".join(letter[a] for a in axes) for axes in subscripts)
    return torch.einsum(f"{text}->{''.join(letter[a] for a in result)}", *operands)
