"""The Triton backend: one launch per factor forward, two backward. It can be imported without triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from einlinear.ops.operands import Gradients, Operands
from einlinear.ops.triton import launch
from einlinear.ops.triton.launch import BLOCK_SLOTS, NO_EPILOGUE, Epilogue, Slots, StridedStep, strided_steps
from einlinear.structures import Structure


def reason_unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the kernels cannot run, or None if they can. They support every structure."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if launch.interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on the CPU"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices (or the CPU with TRITON_INTERPRET=1), not on {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels are written for NVIDIA GPUs of compute capability 8.0 or later"
    return None


def forward(operands: Operands, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates between factors if they are to be saved."""
    if operands.routing is None:
        y, saved = compute(operands, Epilogue(operands.bias))
        return y, saved if save else []
    slots, gated = _arrange(operands)
    y, _ = compute(gated, slots=slots)
    y = _sum_pairs(y[slots.positions])
    return y if operands.bias is None else y.add_(operands.bias), []


def backward(
    operands: Operands, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    _, _, x, _, routing = operands
    grad = grad.to(x.dtype)
    if routing is None:
        grad_x, grad_factors = gradients(operands, grad, saved, needs_x, needs_factors)
        return Gradients(grad_x, None, grad_factors)
    slots, gated = _arrange(operands)
    grads = _to_slots(grad[:, None].expand(-1, routing.indices.shape[1], -1), slots)
    grad_slots, grad_factors = gradients(gated, grads, [], needs_x, needs_factors, slots=slots)
    if grad_slots is None:
        return Gradients(None, None, grad_factors)
    # (n, active, in_features)
    grad_inputs = grad_slots[slots.positions]
    grad_gates = (grad_inputs * x[:, None]).sum(2, dtype=x.dtype)
    return Gradients(_sum_pairs(grad_inputs * routing.gates[..., None]), grad_gates, grad_factors)


def compute(
    operands: Operands, epilogue: Epilogue = NO_EPILOGUE, slots: Slots | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the result of an epilogue, which has the bias, and the intermediates. The rows of x may be slots."""
    structure, factors, x, _, _ = operands
    terms = [*zip(strided_steps(structure), structure.by_term(factors), strict=True)]
    total, saved = epilogue.addend, list[Tensor]()
    for i, (steps, (_, term_factors)) in enumerate(terms, 1):
        weights = [factor.contiguous() for factor in term_factors]
        sources = _sources(steps, weights, x, slots)
        last = epilogue if i == len(terms) else NO_EPILOGUE
        total = launch.multiply(steps[-1], weights[-1], sources[-1], last._replace(addend=total), slots)
        saved += sources[1:]
    assert total is not None
    return total, saved


def gradients(
    operands: Operands,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
    epilogue: Epilogue = NO_EPILOGUE,
    slots: Slots | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x, or of the slots, with an epilogue, and of the factors, of a dtype."""
    structure, factors, x, _, _ = operands
    remaining = iter(saved)
    grad_x, grad_factors = epilogue.addend, list[Tensor | None]([None] * len(factors))
    terms = [*zip(strided_steps(structure), structure.by_term(range(len(factors))), strict=True)]
    for number, (steps, (_, numbers)) in enumerate(terms, 1):
        weights, needs = [factors[i].contiguous() for i in numbers], [needs_factors[i] for i in numbers]
        sources = [x, *islice(remaining, len(steps) - 1)]
        if not saved and any(needs[1:]):
            sources = _sources(steps, weights, x, slots)
        last = epilogue if number == len(terms) else NO_EPILOGUE
        upstream = grad
        for i in reversed(range(len(steps))):
            step, weight = steps[i], weights[i]
            if needs[i]:
                grad_factors[numbers[i]] = launch.gradient_of_factor(step, weight, sources[i], upstream, slots, dtype)
            if not (needs_x or any(needs[:i])):
                break
            into = NO_EPILOGUE if i else last._replace(addend=grad_x)
            upstream = launch.multiply(step.transposed, weight, upstream, into, slots)
        else:
            grad_x = upstream
    return grad_x, grad_factors


def _sources(steps: Sequence[StridedStep], weights: Sequence[Tensor], x: Tensor, slots: Slots | None) -> list[Tensor]:
    """The source of every step of a term: the input, then the intermediates."""
    sources = [x]
    for step, weight in zip(steps[:-1], weights[:-1], strict=True):
        sources.append(launch.multiply(step, weight, sources[-1], slots=slots))
    return sources


def _arrange(operands: Operands) -> tuple[Slots, Operands]:
    """Sort pairs by expert. Return their slots, and the operands without bias for the gated inputs in these slots."""
    assert operands.routing is not None
    indices, gates = operands.routing
    flat, experts, pairs = indices.flatten(), operands.experts, indices.numel()
    loads = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    starts = flat.new_zeros(experts + 1)
    torch.cumsum((loads + BLOCK_SLOTS - 1) // BLOCK_SLOTS * BLOCK_SLOTS, 0, out=starts[1:])
    order = flat.argsort(stable=True)
    shift = starts[:-1] - (loads.cumsum(0) - loads)
    sorted_positions = torch.arange(pairs, device=flat.device) + shift[flat[order]]
    positions = torch.empty_like(flat).scatter_(0, order, sorted_positions).view(indices.shape)
    # the number of blocks is only bounded from above, so that nothing waits for the device
    first_slots = torch.arange(pairs // BLOCK_SLOTS + min(experts, pairs), device=flat.device) * BLOCK_SLOTS
    # blocks that are left over hold zeros, so any expert will do
    expert = torch.searchsorted(starts[1:], first_slots, right=True).clamp(max=experts - 1)
    slots = Slots(positions, expert.int(), starts.int())
    return slots, operands._replace(x=_to_slots(operands.x[:, None] * gates[..., None], slots), bias=None)


def _to_slots(pairs: Tensor, slots: Slots) -> Tensor:
    """Copy rows (n, active, features) to their slots; empty slots are zero."""
    empty = pairs.new_zeros(len(slots.experts) * BLOCK_SLOTS, pairs.shape[2])
    return empty.index_copy_(0, slots.positions.flatten(), pairs.flatten(0, 1))


def _sum_pairs(pairs: Tensor) -> Tensor:
    """(n, active, features) to (n, features), of the same dtype also under autocast, which would widen a sum."""
    return pairs.squeeze(1) if pairs.shape[1] == 1 else pairs.sum(1, dtype=pairs.dtype)
