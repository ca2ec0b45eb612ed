"""The batched-matmul backend: one strided matmul per factor, forward and backward, as `plan` says.

Shapes: B, K, F, N are the products of the sizes of a step's batch, contracted, free and new axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops import reference
from einlinear.ops.batched.contraction_plan import TOKENS, Step, is_run, plan
from einlinear.ops.product import Assignment, Gradients, Product
from einlinear.structures import Structure
from einlinear.structures.pattern import Axes


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this backend cannot run, or None if it can."""
    return (
        None
        if dtype.is_floating_point
        else f"it computes with real numbers, not with {str(dtype).removeprefix('torch.')}"
    )


def forward(product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates if they are to be saved."""
    structure, factors, x, bias, routing = product
    if routing is not None:
        y = x.new_zeros(x.shape[0], structure.out_features) if bias is None else bias.repeat(x.shape[0], 1)
        for expert in _experts(product, routing):
            y.index_add_(0, expert.tokens, forward(expert.product, False)[0])
        return y, []
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    total: Tensor | None = None
    intermediates: list[Tensor] = []
    for steps in plan(structure):
        z = _token_major(x, steps[0].source, sizes)
        for step in steps:
            if save and step is not steps[0]:
                intermediates.append(z)
            z = _next(factors, step, z, sizes)
        output = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = output if total is None else total.add_(output)
    assert total is not None
    # nothing else uses this memory, so it is handed out as no view of anything: activations may then overwrite it
    y = torch.ops.aten._unsafe_view(total.contiguous(), (x.shape[0], structure.out_features))
    return y if bias is None else y.add_(bias), intermediates


def backward(
    product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    structure, factors, x, _, routing = product
    if routing is not None:
        return _backward_routed(product, routing, grad, needs_x, needs_factors)
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    remaining = iter(saved)
    for steps in plan(structure):
        # the input of every step
        inputs = [_token_major(x, steps[0].source, sizes)]
        for position, step in enumerate(steps[:-1]):
            if saved:
                inputs.append(next(remaining))
            elif any(needs_factors[s.index] for s in steps[position + 1 :]):
                inputs.append(_next(factors, step, inputs[-1], sizes))
        g = _token_major(grad, steps[-1].result, sizes)
        for position in reversed(range(len(steps))):
            step = steps[position]
            g3 = g if step.plain else _merge(g, step.result, (step.batch, step.new, step.free), sizes)
            if needs_factors[step.index]:
                grad_factors[step.index] = _grad_factor(step, g, g3, inputs[position], sizes)
            if not (needs_x or any(needs_factors[s.index] for s in steps[:position])):
                break
            if step.plain:
                g = g @ factors[step.index]
                continue
            w = _weight(factors[step.index], step, sizes).transpose(1, 2)
            g = _product(w, g3, (step.batch, step.contracted, step.free), step.source, sizes)
        else:
            if needs_x:
                grad_term = g.reshape(x.shape[0], math.prod(g.shape[1:]))[:, : structure.in_features]
                grad_x = grad_term if grad_x is None else grad_x.add_(grad_term)
    return Gradients(grad_x, None, grad_factors)


def _backward_routed(
    product: Product, routing: Assignment, grad: Tensor, needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    tensors = (product.x, routing.gates, *product.factors)
    needed = (needs_x, needs_x, *needs_factors)
    # zeros for tokens and experts without any pair
    grad_x, grad_gates, *grad_factors = (
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if needs else None
        for tensor, needs in zip(tensors, needed, strict=True)
    )
    for expert in _experts(product, routing):
        gradients = backward(expert.product, grad[expert.tokens], [], needs_x, needs_factors)
        if grad_x is not None and grad_gates is not None and gradients.x is not None:
            grad_x.index_add_(0, expert.tokens, gradients.x * expert.gates)
            grad_gates.view(-1)[expert.pairs] = (gradients.x * product.x[expert.tokens]).sum(1)
        for stack, grad_factor in zip(grad_factors, gradients.factors, strict=True):
            if stack is not None and grad_factor is not None:
                stack[expert.number] = grad_factor
    return Gradients(grad_x, grad_gates, grad_factors)


class _Expert(NamedTuple):
    """One expert's share of a routed product: its pairs of a token and an expert, their tokens and gates."""

    number: int
    pairs: Tensor
    tokens: Tensor
    gates: Tensor
    product: Product


def _experts(product: Product, routing: Assignment) -> Iterator[_Expert]:
    """Yield the experts that have tokens."""
    structure, factors, x, _, _ = product
    flat = routing.indices.flatten()
    pairs_of = flat.argsort(stable=True).split(torch.bincount(flat, minlength=product.experts).tolist())
    for e, pairs in enumerate(pairs_of):
        if len(pairs):
            tokens, gates = pairs // routing.indices.shape[1], routing.gates.flatten()[pairs, None]
            yield _Expert(e, pairs, tokens, gates, Product(structure, [f[e] for f in factors], x[tokens] * gates))


def _next(factors: Sequence[Tensor], step: Step, z: Tensor, sizes: dict[str, int]) -> Tensor:
    """Return the intermediate after a step."""
    if step.plain:
        return F.linear(z, factors[step.index])
    w = _weight(factors[step.index], step, sizes)
    z3 = _merge(z, step.source, (step.batch, step.contracted, step.free), sizes)
    return _product(w, z3, (step.batch, step.new, step.free), step.result, sizes)


def _grad_factor(step: Step, g: Tensor, g3: Tensor, z: Tensor, sizes: dict[str, int]) -> Tensor:
    if step.plain:
        return g.T @ z
    batch, free = step.batch, step.free
    if step.repeats:
        batch, free = (), step.batch + step.free
        g3 = _merge(g, step.result, (batch, step.new, free), sizes)
    z3 = _merge(z, step.source, (batch, free, step.contracted), sizes)
    return _product(g3, z3, (batch, step.new, step.contracted), step.factor, sizes)


def _token_major(x: Tensor, axes: Axes, sizes: dict[str, int]) -> Tensor:
    """Return (n, features) padded and viewed with one dimension per axis."""
    shape = [sizes[a] for a in axes]
    return reference.pad(x, math.prod(shape[1:])).reshape(shape)


def _weight(factor: Tensor, step: Step, sizes: dict[str, int]) -> Tensor:
    """Return the factor as (B, N, K)."""
    w = _merge(factor, step.factor, ((() if step.repeats else step.batch), step.new, step.contracted), sizes)
    return w.expand(math.prod(sizes[a] for a in step.batch), -1, -1) if step.repeats else w


def _permute(tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    return tensor.permute([axes.index(a) for a in wanted])


def _merge(tensor: Tensor, axes: Axes, groups: tuple[Axes, Axes, Axes], sizes: dict[str, int]) -> Tensor:
    """Return a three-dimensional tensor, one dimension per group: a view where strides allow it."""
    shape = [math.prod(sizes[a] for a in group) for group in groups]
    return _permute(tensor, axes, groups[0] + groups[1] + groups[2]).reshape(shape)


def _product(a: Tensor, b: Tensor, groups: tuple[Axes, Axes, Axes], layout: Axes, sizes: dict[str, int]) -> Tensor:
    """Return the product of (B, N, K) and (B, K, F) with dimensions as the layout, also in memory if possible."""
    if all(is_run(group, layout) for group in groups):
        y = a.new_empty([sizes[axis] for axis in layout])
        torch.bmm(a, b, out=_merge(y, layout, groups, sizes))
        return y
    axes = groups[0] + groups[1] + groups[2]
    return _permute(torch.bmm(a, b).view([sizes[axis] for axis in axes]), axes, layout)
