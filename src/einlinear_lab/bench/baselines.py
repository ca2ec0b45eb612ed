"""The published, copying implementation and tensorly-torch, with factors (and gradients) in layouts of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import cast

from torch import Tensor, nn

from einlinear.ops.reference import pad
from einlinear.structures import Factor, Structure
from einlinear.structures.pattern import Axes

# the axis of the tokens: no axis of a pattern has this name
_TOKENS = ""


def copying_weights(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors as `copying` takes them: (batch, contracted, new), or (contracted, new) without batch axes."""
    sizes = dict(structure.sizes)
    return [
        _matrices(w.permute([f.axes.index(a) for a in f.batch + f.contracted + f.new]), f, f.fan_in, sizes)
        for f, w in zip(structure.factors, factors, strict=True)
    ]


def copying(structure: Structure, weights: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the published implementation of two-factor structures: x (n, in_features) -> (n, out_features).

    Batched matmuls have their batch axes first, so the intermediate and the output are transposed and made contiguous.
    """
    sizes = {**dict(structure.sizes), _TOKENS: x.shape[0]}
    total: Tensor | None = None
    for term, term_weights in structure.by_term(weights):
        axes: Axes = (_TOKENS, *term.inputs)
        z = pad(x, math.prod(sizes[a] for a in term.inputs)).reshape([sizes[a] for a in axes])
        for factor, w in zip(term.factors, term_weights):
            columns = (_TOKENS, *factor.free)
            z = z.permute([axes.index(a) for a in factor.batch + columns + factor.contracted])
            z = z if factor is term.factors[0] else z.contiguous()
            z = _matrices(z, factor, math.prod(sizes[a] for a in columns), sizes) @ w
            axes = factor.batch + columns + factor.new
            z = z.reshape([sizes[a] for a in axes])
        z = z.permute([axes.index(a) for a in (_TOKENS, *term.outputs)]).contiguous()
        part = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = part if total is None else total + part
    assert total is not None
    return total if bias is None else total + bias


def _matrices(tensor: Tensor, factor: Factor, rows: int, sizes: dict[str, int]) -> Tensor:
    """Merge the axes of each group: (batch axes, row axes, column axes)."""
    batch = [math.prod(sizes[a] for a in factor.batch)] if factor.batch else []
    return tensor.reshape(*batch, rows, tensor.numel() // max(1, math.prod(batch) * rows))


def is_blocktt(structure: Structure) -> bool:
    """Return whether tensorly-torch's BlockTT layer supports the structure: a tensor-train matrix without padding."""
    sizes, term = dict(structure.sizes), structure.terms[0]
    padded = math.prod(sizes[a] for a in term.inputs + term.outputs)
    return bool(_cores(structure)) and structure.in_features * structure.out_features == padded


def blocktt_weights(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors as tensorly-torch's BlockTT has them: (rank before, out, in, rank after), slow axes first."""
    stored = []
    for core, before, mode, after in _cores(structure):
        w = factors[structure.factors.index(core)]
        sizes = dict(zip(core.axes, w.shape, strict=True))
        shape = (math.prod(sizes[a] for a in axes) for axes in (before, mode[:1], mode[1:], after))
        stored.append(w.permute([core.axes.index(a) for a in (*before, *mode, *after)]).reshape(*shape))
    return stored


def blocktt(weights: Sequence[nn.Parameter], bias: nn.Parameter | None) -> nn.Module:
    """Return the layer of tensorly-torch with these weights."""
    # slow to import, and without types
    tltorch = import_module("tltorch")
    shape = tuple(w.shape[1] for w in weights), tuple(w.shape[2] for w in weights)
    tensor = tltorch.BlockTT(list(weights), tensorized_shape=shape, rank=[1, *(w.shape[3] for w in weights)])
    layer = tltorch.FactorizedLinear(shape[1], shape[0], bias=False, factorization=tensor)
    layer.bias = bias
    return cast(nn.Module, layer)


def _cores(structure: Structure) -> list[tuple[Factor, Axes, Axes, Axes]]:
    """Return the cores of a tensor-train matrix, slow axes first: factor, rank before, (output, input), rank after."""
    term = structure.terms[0]
    if len(structure.terms) > 1 or not len(term.inputs) == len(term.outputs) == len(term.factors) == 2:
        return []
    first, second = sorted(term.factors, key=lambda factor: term.inputs[0] not in factor.axes)
    slow, fast = zip(term.outputs, term.inputs, strict=True)
    rank = tuple(a for a in first.axes if a in second.axes)
    cores: list[tuple[Factor, Axes, Axes, Axes]] = [(first, (), slow, rank), (second, rank, fast, ())]
    return cores if all({*core.axes} == {*mode, *rank} for core, _, mode, _ in cores) else []
