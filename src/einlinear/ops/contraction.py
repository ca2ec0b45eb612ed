"""The batched-matmul executor: one strided matmul per factor, forward and backward, without copies where possible.

A step multiplies a factor (batch, rows, inner) with the state (batch, inner, columns), where the columns are the
tokens and whatever the factor does not touch. It writes into a layout that the next step can read as strided views,
and the last one into the token-major output: a two-factor BTT thus copies no activation at all, and its intermediate
is feature-major, tokens last. Which axes play which part is planned once per structure.

Shapes: B, R, K, C are the products of the sizes of a step's batch, row, inner and column axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from einlinear.ops import reference
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

TOKENS = ""  # the axis of the tokens; no axis of a pattern has this name


@dataclass(frozen=True)
class Step:
    """One contraction: the part every axis plays, and how the states before and after lie in memory.

    `batch` are axes of factor and state, or, where the factor has none, axes over which it is repeated.
    """

    factor: Axes
    batch: Axes
    rows: Axes
    inner: Axes
    columns: Axes
    source: Axes
    result: Axes

    @property
    def repeats(self) -> bool:
        """Whether the same matrix multiplies every batch entry."""
        return bool(self.batch) and self.batch[0] not in self.factor


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> tuple[tuple[Step, ...], ...]:
    """The steps of every term; the first reads and the last writes token-major."""
    return tuple(_plan_term(term) for term in structure.terms)


def _plan_term(term: Term) -> tuple[Step, ...]:
    source: Axes = (TOKENS, *term.inputs)
    steps = []
    for factor in term.factors:
        last = factor is term.factors[-1]
        # every group in the order in which it lies in memory, so that its axes merge into one dimension
        batch = tuple(a for a in source if a in factor.batch)
        inner = tuple(a for a in source if a in factor.summed)
        columns = tuple(a for a in source if a not in factor.axes)
        rows = factor.introduced
        if last:
            result: Axes = (TOKENS, *term.outputs)
            rows = tuple(sorted(rows, key=result.index))
        elif batch:
            columns = (*(a for a in columns if a != TOKENS), TOKENS)
            result = batch + rows + columns
        else:  # an ordinary matrix product can as well stay token-major
            result = columns + rows
        if last and not batch and not _is_run(columns, result) and columns[0] == TOKENS:
            batch, columns = columns[:1], columns[1:]  # one product per token
        steps.append(Step(factor.axes, batch, rows, inner, columns, source, result))
        source = result
    return tuple(steps)


@lru_cache(maxsize=4096)
def copy_free(structure: Structure) -> bool:
    """Whether every step reads and writes its states as views (copies of padding apart)."""
    return all(
        _is_run(group, layout)
        for steps in plan(structure)
        for step in steps
        for layout, middle in ((step.source, step.inner), (step.result, step.rows))
        for group in (step.batch, middle, step.columns)
    )


def apply(structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias for x of shape (n, in_features), differentiable in x, the factors and the bias."""
    result: Tensor = _Contraction.apply(structure, x, bias, *factors)  # type: ignore[no-untyped-call]
    return result


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: Structure, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        y, states = _forward(structure, factors, x)
        if bias is not None:
            y.add_(bias)
        ctx.structure, ctx.count = structure, len(factors)
        ctx.save_for_backward(x, bias, *factors, *states)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, bias, *rest = ctx.saved_tensors
        factors, states = rest[: ctx.count], rest[ctx.count :]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: let autograd see plain operators
            return (None, *_reference_gradients(ctx, x, bias, factors, grad))
        needs = ctx.needs_input_grad[1:]
        grad_bias = grad.sum(0) if bias is not None and needs[1] else None
        grad_x, grad_factors = _backward(ctx.structure, factors, states, x, grad, needs[0], needs[2:])
        return (None, grad_x, grad_bias, *grad_factors)


def _reference_gradients(
    ctx: Any, x: Tensor, bias: Tensor | None, factors: list[Tensor], grad: Tensor
) -> list[Tensor | None]:
    y = reference.apply(ctx.structure, factors, x)
    if bias is not None:
        y = y + bias
    inputs = [x, bias, *factors]
    wanted = [(i, t) for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[1 + i]]
    found = torch.autograd.grad(y, [tensor for _, tensor in wanted], grad, create_graph=True)
    result: list[Tensor | None] = [None] * len(inputs)
    for (i, _), gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result


def _forward(structure: Structure, factors: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output without bias, and the state before every factor but each term's first."""
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    remaining = iter(factors)
    total: Tensor | None = None
    states: list[Tensor] = []
    for steps in plan(structure):
        z = _token_major(x, steps[0].source, sizes)
        for step in steps:
            if step is not steps[0]:
                states.append(z)
            w = _weight(next(remaining), step, sizes)
            z3 = _merge(z, step.source, (step.batch, step.inner, step.columns), sizes)
            z = _product(w, z3, (step.batch, step.rows, step.columns), step.result, sizes)
        part = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.contiguous(), states


def _backward(
    structure: Structure,
    factors: Sequence[Tensor],
    states: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    first = 0  # the index of the term's first factor
    saved = iter(states)
    for steps in plan(structure):
        before = [_token_major(x, steps[0].source, sizes), *(next(saved) for _ in steps[1:])]
        g = _token_major(grad, steps[-1].result, sizes)
        for position in reversed(range(len(steps))):
            step, index = steps[position], first + position
            g3 = _merge(g, step.result, (step.batch, step.rows, step.columns), sizes)
            if needs_factors[index]:
                grad_factors[index] = _grad_factor(step, g, g3, before[position], sizes)
            if not (needs_x or any(needs_factors[first:index])):
                break
            w = _weight(factors[index], step, sizes).transpose(1, 2)
            g = _product(w, g3, (step.batch, step.inner, step.columns), step.source, sizes)
        else:
            if needs_x:
                part = g.reshape(x.shape[0], math.prod(g.shape[1:]))[:, : structure.in_features]
                grad_x = part if grad_x is None else grad_x.add_(part)
        first += len(steps)
    return grad_x, grad_factors


def _grad_factor(step: Step, g: Tensor, g3: Tensor, z: Tensor, sizes: dict[str, int]) -> Tensor:
    batch, columns = step.batch, step.columns
    if step.repeats:
        batch, columns = (), step.batch + step.columns
        g3 = _merge(g, step.result, (batch, step.rows, columns), sizes)
    z3 = _merge(z, step.source, (batch, columns, step.inner), sizes)
    axes = batch + step.rows + step.inner
    return _permute(torch.bmm(g3, z3).view([sizes[a] for a in axes]), axes, step.factor)


def _token_major(x: Tensor, axes: Axes, sizes: dict[str, int]) -> Tensor:
    """(n, features) padded and viewed with one dimension per axis."""
    shape = [sizes[a] for a in axes]
    return reference.pad(x, math.prod(shape[1:])).reshape(shape)


def _weight(factor: Tensor, step: Step, sizes: dict[str, int]) -> Tensor:
    """The factor as (B, R, K)."""
    w = _merge(factor, step.factor, ((() if step.repeats else step.batch), step.rows, step.inner), sizes)
    return w.expand(math.prod(sizes[a] for a in step.batch), -1, -1) if step.repeats else w


def _permute(tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    return tensor.permute([axes.index(a) for a in wanted])


def _merge(tensor: Tensor, axes: Axes, groups: tuple[Axes, Axes, Axes], sizes: dict[str, int]) -> Tensor:
    """A three-dimensional tensor, one dimension per group: a view where strides allow it."""
    shape = [math.prod(sizes[a] for a in group) for group in groups]
    return _permute(tensor, axes, groups[0] + groups[1] + groups[2]).reshape(shape)


def _product(a: Tensor, b: Tensor, groups: tuple[Axes, Axes, Axes], layout: Axes, sizes: dict[str, int]) -> Tensor:
    """The product of (B, R, K) and (B, K, C), its dimensions in the order of the layout; laid out so if it can be."""
    if all(_is_run(group, layout) for group in groups):
        y = a.new_empty([sizes[axis] for axis in layout])
        torch.bmm(a, b, out=_merge(y, layout, groups, sizes))
        return y
    axes = groups[0] + groups[1] + groups[2]
    return _permute(torch.bmm(a, b).view([sizes[axis] for axis in axes]), axes, layout)


def _is_run(group: Axes, layout: Axes) -> bool:
    """Whether the axes stand next to each other, in this order, in the layout: then merging them is a view."""
    return not group or group == layout[layout.index(group[0]) :][: len(group)]
