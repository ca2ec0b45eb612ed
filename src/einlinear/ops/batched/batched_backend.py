"""The batched-matmul backend: one strided matmul per factor, forward and backward, as `plan` says.

Shapes: B, R, K, C are the products of the sizes of a step's batch, row, inner and column axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops import reference
from einlinear.ops.batched.plan import TOKENS, Step, is_run, plan
from einlinear.structures import Structure
from einlinear.structures.pattern import Axes


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this backend cannot run, or None if it can."""
    return (
        None
        if dtype.is_floating_point
        else f"it computes with real numbers, not with {str(dtype).removeprefix('torch.')}"
    )


def forward(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y = x W^T + bias for x of shape (n, in_features), and the intermediate states if they are to be saved."""
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    total: Tensor | None = None
    states: list[Tensor] = []
    for steps in plan(structure):
        z = _token_major(x, steps[0].source, sizes)
        for step in steps:
            if save and step is not steps[0]:
                states.append(z)
            z = _next(factors, step, z, sizes)
        part = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = part if total is None else total.add_(part)
    assert total is not None
    # The memory is ours alone, so it is handed out as no view of anything: activations may then overwrite it.
    y: Tensor = torch.ops.aten._unsafe_view(total.contiguous(), (x.shape[0], structure.out_features))
    return y if bias is None else y.add_(bias), states


def backward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the factors, those that are needed; without saved states these are computed again."""
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    remaining = iter(saved)
    for steps in plan(structure):
        before = [_token_major(x, steps[0].source, sizes)]  # what every step reads
        for position, step in enumerate(steps[:-1]):
            if saved:
                before.append(next(remaining))
            elif any(needs_factors[s.index] for s in steps[position + 1 :]):
                before.append(_next(factors, step, before[-1], sizes))
        g = _token_major(grad, steps[-1].result, sizes)
        for position in reversed(range(len(steps))):
            step = steps[position]
            g3 = g if step.plain else _merge(g, step.result, (step.batch, step.rows, step.columns), sizes)
            if needs_factors[step.index]:
                grad_factors[step.index] = _grad_factor(step, g, g3, before[position], sizes)
            if not (needs_x or any(needs_factors[s.index] for s in steps[:position])):
                break
            if step.plain:
                g = g @ factors[step.index]
                continue
            w = _weight(factors[step.index], step, sizes).transpose(1, 2)
            g = _product(w, g3, (step.batch, step.inner, step.columns), step.source, sizes)
        else:
            if needs_x:
                part = g.reshape(x.shape[0], math.prod(g.shape[1:]))[:, : structure.in_features]
                grad_x = part if grad_x is None else grad_x.add_(part)
    return grad_x, grad_factors


def forward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """For every token the sum over its experts of W_expert (gate * x), plus a bias: one expert after the other."""
    y = x.new_zeros(x.shape[0], structure.out_features) if bias is None else bias.repeat(x.shape[0], 1)
    for e, pairs, tokens in _of_experts(indices, len(factors[0])):
        inputs = x[tokens] * gates.flatten()[pairs, None]
        y.index_add_(0, tokens, forward(structure, [factor[e] for factor in factors], inputs, None, False)[0])
    return y


def backward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    grad: Tensor,
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the gates, if they are needed, and of those of the stacked factors that are."""
    plain = torch.contiguous_format
    grad_x = torch.zeros_like(x, memory_format=plain) if needs_x else None
    grad_gates = torch.empty_like(gates, memory_format=plain) if needs_x else None
    found = [
        torch.zeros_like(factor, memory_format=plain) if needed else None
        for factor, needed in zip(factors, needs_factors, strict=True)
    ]
    for e, pairs, tokens in _of_experts(indices, len(factors[0])):
        own, scales = x[tokens], gates.flatten()[pairs, None]
        of_expert = [factor[e] for factor in factors]
        back, of_factors = backward(structure, of_expert, own * scales, grad[tokens], [], needs_x, needs_factors)
        if grad_x is not None and grad_gates is not None and back is not None:
            grad_x.index_add_(0, tokens, back * scales)
            grad_gates.view(-1)[pairs] = (back * own).sum(1)
        for total, of_factor in zip(found, of_factors, strict=True):
            if total is not None and of_factor is not None:
                total[e] = of_factor
    return grad_x, grad_gates, found


def _of_experts(indices: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """Of every expert that has any: which pairs are its own, and of which tokens they are."""
    flat = indices.flatten()
    parts = flat.argsort(stable=True).split(torch.bincount(flat, minlength=experts).tolist())
    return [(e, pairs, pairs // indices.shape[1]) for e, pairs in enumerate(parts) if len(pairs)]


def _next(factors: Sequence[Tensor], step: Step, z: Tensor, sizes: dict[str, int]) -> Tensor:
    """The state after a step."""
    if step.plain:
        return F.linear(z, factors[step.index])
    w = _weight(factors[step.index], step, sizes)
    z3 = _merge(z, step.source, (step.batch, step.inner, step.columns), sizes)
    return _product(w, z3, (step.batch, step.rows, step.columns), step.result, sizes)


def _grad_factor(step: Step, g: Tensor, g3: Tensor, z: Tensor, sizes: dict[str, int]) -> Tensor:
    if step.plain:
        return g.T @ z
    batch, columns = step.batch, step.columns
    if step.repeats:
        batch, columns = (), step.batch + step.columns
        g3 = _merge(g, step.result, (batch, step.rows, columns), sizes)
    z3 = _merge(z, step.source, (batch, columns, step.inner), sizes)
    return _product(g3, z3, (batch, step.rows, step.inner), step.factor, sizes)


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
    if all(is_run(group, layout) for group in groups):
        y = a.new_empty([sizes[axis] for axis in layout])
        torch.bmm(a, b, out=_merge(y, layout, groups, sizes))
        return y
    axes = groups[0] + groups[1] + groups[2]
    return _permute(torch.bmm(a, b).view([sizes[axis] for axis in axes]), axes, layout)
