"""The product as it is exported: plain matrix products, which every runtime has, and few transpositions.

The steps and layouts of the batched backend's plan become reshapes and permutations of plain numbers, with -1 for the
tokens, so a graph computes no shapes. onnxruntime fuses most permutations with the product that reads the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear import structures
from einlinear.ops.batched.matmul_plan import TOKENS, Step, matmul_steps
from einlinear.ops.dispatch import assume_constant_result
from einlinear.ops.operands import Operands
from einlinear.structures.pattern import Axes

Shape = tuple[int, ...]


class Rearrangement(NamedTuple):
    """A reshape, a permutation and a reshape; () where there is none."""

    pieces: Shape
    order: Shape
    shape: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the rearranged tensor."""
        tensor = tensor.reshape(self.pieces) if self.pieces else tensor
        tensor = tensor.permute(self.order) if self.order else tensor
        return tensor.reshape(self.shape) if self.shape else tensor


class MatrixProduct(NamedTuple):
    """A step: the product of `Structure.factors[factor_index]` and the intermediate, both rearranged."""

    factor_index: int
    factor: Rearrangement
    intermediate: Rearrangement
    # the factor is the left operand
    factor_first: bool


class Output(NamedTuple):
    """The shape of a term's last product, how the product becomes (n, features), and the features to be dropped."""

    shape: Shape
    rearrangement: Rearrangement
    surplus: int


def apply(operands: Operands) -> Tensor:
    """Return y of shape (n, out_features), without a routing."""
    structure, factors, x, bias, _ = operands
    # terms that end in the same layout are added before they are rearranged
    sums: dict[Output, Tensor] = {}
    for padding, steps, output in _matrix_products(structure.spec, structure.in_features, structure.out_features):
        z = F.pad(x, (0, padding)) if padding else x
        for step in steps:
            w, z = step.factor.apply(factors[step.factor_index]), step.intermediate.apply(z)
            z = w @ z if step.factor_first else z @ w
        sums[output] = sums[output] + z if output in sums else z
    outputs = []
    for output, z in sums.items():
        z = output.rearrangement.apply(z)
        outputs.append(z[:, : structure.out_features] if output.surplus else z)
    y = functools.reduce(torch.add, outputs)
    return y if bias is None else y + bias


@assume_constant_result
def _matrix_products(spec: str, in_features: int, out_features: int) -> list[tuple[int, list[MatrixProduct], Output]]:
    """Return the padding, the matrix products and the output of every term."""
    structure = structures.structure(spec, in_features, out_features)
    pairs = zip(structure.terms, matmul_steps(structure), strict=True)
    return [_products_of_term(steps, dict(structure.sizes), *structure.padding(term)) for term, steps in pairs]


def _products_of_term(
    steps: Sequence[Step], sizes: Mapping[str, int], padding: int, surplus: int
) -> tuple[int, list[MatrixProduct], Output]:
    tokens, inputs, outputs = (TOKENS,), steps[0].source[1:], steps[-1].result[1:]
    # the groups of axes that the dimensions of the intermediate stand for
    dims: list[Axes] = [tokens, inputs]
    products = []
    for step in steps:
        batch = [step.batch] if step.batch else []
        first, second = sorted((step.new, step.free), key=lambda group: [step.result.index(a) for a in group])
        factor_first = first == step.new
        w, z = [step.new, step.contracted], [step.contracted, step.free]
        if not factor_first:
            w, z = w[::-1], z[::-1]
        factor = _rearrangement([(a,) for a in step.factor], w if step.repeats else batch + w, sizes)
        intermediate = _rearrangement(dims, batch + z, sizes, across=step is steps[0])
        products.append(MatrixProduct(step.index, factor, intermediate, factor_first))
        dims = [*batch, first, second]
    return padding, products, Output(_shape(dims, sizes), _rearrangement(dims, [tokens, outputs], sizes), surplus)


def _rearrangement(
    dims: list[Axes], groups: list[Axes], sizes: Mapping[str, int], across: bool = False
) -> Rearrangement:
    """Return how a tensor with these dimensions becomes one with a dimension for every group.

    Neighbouring axes are permuted as one: of a group, so that no reshape stands between the permutation and the matrix
    product, which onnxruntime could not fuse then, or `across` groups, which is faster for x and a single token.
    """
    stored, starts = [a for dim in dims for a in dim], [group[0] for group in groups if group and not across]
    pieces: list[Axes] = []
    for axis in [a for group in groups for a in group]:
        position = stored.index(axis)
        if pieces and axis not in starts and position and stored[position - 1] == pieces[-1][-1]:
            pieces[-1] = (*pieces[-1], axis)
        else:
            pieces.append((axis,))
    in_memory = sorted(pieces, key=lambda piece: stored.index(piece[0]))
    if in_memory == pieces:
        pieces = in_memory = dims
    order = [in_memory.index(piece) for piece in pieces] if in_memory != pieces else []
    split = [] if in_memory == dims else in_memory
    return Rearrangement(_shape(split, sizes), tuple(order), _shape([] if pieces == groups else groups, sizes))


def _shape(groups: Sequence[Axes], sizes: Mapping[str, int]) -> Shape:
    return tuple(-1 if TOKENS in group else _size(group, sizes) for group in groups)


def _size(axes: Axes, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
