"""The batched-matmul backend: one strided matmul per factor, forward and backward, as `matmul_plan` says.

Intermediates z and their gradients g have one dimension for each axis of a layout; z3, g3 and w one for each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops import reference
from einlinear.ops.batched.matmul_plan import TOKENS, Step, is_run, matmul_steps
from einlinear.ops.operands import Gradients, Operands, Routing
from einlinear.structures import Structure
from einlinear.structures.pattern import Axes


def reason_unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this backend cannot run, or None if it can."""
    why = f"it computes with real numbers, not with {str(dtype).removeprefix('torch.')}"
    return None if dtype.is_floating_point else why


def forward(operands: Operands, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates if they are to be saved."""
    structure, factors, x, bias, routing = operands
    if routing is not None:
        y = x.new_zeros(x.shape[0], structure.out_features) if bias is None else bias.repeat(x.shape[0], 1)
        for _, _, tokens, expert in _experts(operands, routing):
            y.index_add_(0, tokens, forward(expert, False)[0])
        return y, []
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    total: Tensor | None = None
    intermediates: list[Tensor] = []
    for steps in matmul_steps(structure):
        z = _token_major(x, steps[0].source, sizes)
        for step in steps:
            if save and step is not steps[0]:
                intermediates.append(z)
            z = _contract(factors[step.index], step, z, sizes)
        output = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = output if total is None else total.add_(output)
    assert total is not None
    # nothing else uses this memory, so it is handed out as no view of anything: activations may then overwrite it
    y = torch.ops.aten._unsafe_view(total.contiguous(), (x.shape[0], structure.out_features))
    return y if bias is None else y.add_(bias), intermediates


def backward(
    operands: Operands, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    structure, factors, x, _, routing = operands
    if routing is not None:
        return _backward_routed(operands, routing, grad, needs_x, needs_factors)
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    remaining = iter(saved)
    for steps in matmul_steps(structure):
        # the input of every step
        inputs = [_token_major(x, steps[0].source, sizes)]
        for position, step in enumerate(steps[:-1]):
            if saved:
                inputs.append(next(remaining))
            elif any(needs_factors[s.index] for s in steps[position + 1 :]):
                inputs.append(_contract(factors[step.index], step, inputs[-1], sizes))
        g = _token_major(grad, steps[-1].result, sizes)
        for position in reversed(range(len(steps))):
            step = steps[position]
            g3 = g if step.is_dense else _merge(g, step.result, (step.batch, step.new, step.free), sizes)
            if needs_factors[step.index]:
                grad_factors[step.index] = _grad_factor(step, g, g3, inputs[position], sizes)
            if not (needs_x or any(needs_factors[s.index] for s in steps[:position])):
                break
            g = _grad_source(factors[step.index], step, g3, sizes)
        # unless the loop ended early
        else:
            grad_term = g.reshape(x.shape[0], math.prod(g.shape[1:]))[:, : structure.in_features]
            grad_x = grad_term if grad_x is None else grad_x.add_(grad_term)
    return Gradients(grad_x, None, grad_factors)


def _backward_routed(
    operands: Operands, routing: Routing, grad: Tensor, needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    tensors, needed = (operands.x, routing.gates, *operands.factors), (needs_x, needs_x, *needs_factors)
    # zeros for tokens and experts without any pair
    zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
    grad_x, grad_gates, *grad_factors = (zeros(t) if needs else None for t, needs in zip(tensors, needed, strict=True))
    for e, pairs, tokens, expert in _experts(operands, routing):
        gradients = backward(expert, grad[tokens], [], needs_x, needs_factors)
        if grad_x is not None and grad_gates is not None and gradients.x is not None:
            grad_x.index_add_(0, tokens, gradients.x * routing.gates.flatten()[pairs, None])
            grad_gates.view(-1)[pairs] = (gradients.x * operands.x[tokens]).sum(1)
        for stack, grad_factor in zip(grad_factors, gradients.factors, strict=True):
            if stack is not None and grad_factor is not None:
                stack[e] = grad_factor
    return Gradients(grad_x, grad_gates, grad_factors)


def _experts(operands: Operands, routing: Routing) -> Iterator[tuple[int, Tensor, Tensor, Operands]]:
    """Yield the number, the pairs, the tokens and the operands of every expert that has tokens."""
    structure, factors, x, _, _ = operands
    flat = routing.indices.flatten()
    pairs_of = flat.argsort(stable=True).split(torch.bincount(flat, minlength=operands.experts).tolist())
    for e, pairs in enumerate(pairs_of):
        if len(pairs):
            tokens, gates = pairs // routing.indices.shape[1], routing.gates.flatten()[pairs, None]
            yield e, pairs, tokens, Operands(structure, [f[e] for f in factors], x[tokens] * gates)


def _contract(factor: Tensor, step: Step, z: Tensor, sizes: dict[str, int]) -> Tensor:
    """Return the intermediate after a step."""
    if step.is_dense:
        return F.linear(z, factor)
    w = _weight(factor, step, sizes)
    z3 = _merge(z, step.source, (step.batch, step.contracted, step.free), sizes)
    return _matmul(w, z3, (step.batch, step.new, step.free), step.result, sizes)


def _grad_source(factor: Tensor, step: Step, g3: Tensor, sizes: dict[str, int]) -> Tensor:
    """Return the gradient of the intermediate before a step."""
    if step.is_dense:
        return g3 @ factor
    w = _weight(factor, step, sizes).transpose(1, 2)
    return _matmul(w, g3, (step.batch, step.contracted, step.free), step.source, sizes)


def _grad_factor(step: Step, g: Tensor, g3: Tensor, z: Tensor, sizes: dict[str, int]) -> Tensor:
    if step.is_dense:
        return g.T @ z
    batch, free = step.batch, step.free
    if step.repeats:
        batch, free = (), step.batch + step.free
        g3 = _merge(g, step.result, (batch, step.new, free), sizes)
    z3 = _merge(z, step.source, (batch, free, step.contracted), sizes)
    return _matmul(g3, z3, (batch, step.new, step.contracted), step.factor, sizes)


def _token_major(x: Tensor, axes: Axes, sizes: dict[str, int]) -> Tensor:
    """Return (n, features) padded and viewed with one dimension per axis."""
    shape = [sizes[a] for a in axes]
    return reference.pad(x, math.prod(shape[1:])).reshape(shape)


def _weight(factor: Tensor, step: Step, sizes: dict[str, int]) -> Tensor:
    """Return the factor as (batch, new, contracted)."""
    w = _merge(factor, step.factor, (() if step.repeats else step.batch, step.new, step.contracted), sizes)
    return w.expand(math.prod(sizes[a] for a in step.batch), -1, -1) if step.repeats else w


def _merge(tensor: Tensor, axes: Axes, groups: tuple[Axes, Axes, Axes], sizes: dict[str, int]) -> Tensor:
    """Return a three-dimensional tensor, one dimension per group: a view where strides allow it."""
    shape = [math.prod(sizes[a] for a in group) for group in groups]
    return tensor.permute([axes.index(a) for group in groups for a in group]).reshape(shape)


def _matmul(a: Tensor, b: Tensor, groups: tuple[Axes, Axes, Axes], layout: Axes, sizes: dict[str, int]) -> Tensor:
    """Return the batched product, with the axes of the groups as the layout, also in memory if possible."""
    if all(is_run(group, layout) for group in groups):
        y = a.new_empty([sizes[axis] for axis in layout])
        torch.bmm(a, b, out=_merge(y, layout, groups, sizes))
        return y
    axes = groups[0] + groups[1] + groups[2]
    return torch.bmm(a, b).view([sizes[axis] for axis in axes]).permute([axes.index(axis) for axis in layout])
