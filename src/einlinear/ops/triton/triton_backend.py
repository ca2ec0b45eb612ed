"""The Triton backend: products of structures on NVIDIA GPUs, forward and backward, from the plan of `steps.py` alone.

Two designs. *Steps*: one launch per factor; the state between two factors is written once, in a layout that both reach
in whole sectors. *Fused*: both factors of a term in one launch, the state between them stays on chip. The second is
taken where `fusing_pays` (tile_sizes.py). Going back, one launch per factor gives both gradients of a step wherever a
tile holds a whole matrix of the factor, so that nothing is read twice. docs/gpu-kernels.md counts the bytes.

This package can be imported without triton; `unsupported` says what is missing. Nothing here knows of autograd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.triton import tile_sizes
from einlinear.ops.triton.launch import interpreting, launch_back, launch_fused, launch_step, tiles_back
from einlinear.ops.triton.slots import Rows, Slots, arrange
from einlinear.ops.triton.steps import Step, plan
from einlinear.structures import Structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DESIGNS = ("steps", "fused")


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels cannot run, or None if they can. They know every structure."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on the CPU"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices (or the CPU with TRITON_INTERPRET=1), not on {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels are written for NVIDIA GPUs of compute capability 8.0 or later"
    return None


def forward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    save: bool,
    design: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """y = x W^T + bias for x of shape (n, in_features), and the states between factors, if they are to be saved.

    Args:
        structure: what the matrix is.
        factors, bias: of the dtype and device of x.
        x: any strides.
        save: whether to return what `backward` can reuse. It is opaque.
        design: "steps" or "fused" (ValueError where it does not fit); None takes the one that moves fewer bytes.
    """
    x = _unit_stride(x)
    if not len(x):
        return x.new_empty(0, structure.out_features), []
    y: Tensor | None = None
    saved: list[Tensor] = []
    for steps, (_, own) in zip(plan(structure), structure.by_term(factors), strict=True):
        weights = [factor.contiguous() for factor in own]
        y, states = _chain(steps, weights, x, bias if y is None else None, y, save, design)
        saved += states
    assert y is not None
    return y, saved


def forward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """For every token the sum over its experts of W_expert (gate * x), plus a bias; see `ops.grouped`."""
    if not len(x):
        return x.new_empty(0, structure.out_features)
    x, slots = _unit_stride(x), arrange(indices, gates, len(factors[0]))
    y: Tensor | None = None
    for steps, (_, own) in zip(plan(structure), structure.by_term(factors), strict=True):
        weights = [factor.contiguous() for factor in own]
        y, _ = _chain(steps, weights, x, None, y, False, None, slots, slots.inputs)
    assert y is not None
    total = _sum_pairs(y.view(*indices.shape, structure.out_features))
    return total if bias is None else total.add_(bias)


def backward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
    design: str | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the factors that are wanted, given that of y.

    Args:
        saved: what `forward` returned; if that is empty, states that are needed are computed again.
        needs_x, needs_factors: what is wanted; the rest is None.
        design: as in `forward`, where only the gradient of x is wanted.
    """
    x, grad = _unit_stride(x), _unit_stride(grad)
    if not len(x):
        zeros = [
            torch.zeros_like(factor) if need else None for factor, need in zip(factors, needs_factors, strict=True)
        ]
        return x.new_empty(x.shape) if needs_x else None, zeros
    states = iter(saved)
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = []
    parts = structure.by_term(list(zip(factors, needs_factors, strict=True)))
    for steps, (_, own) in zip(plan(structure), parts, strict=True):
        weights, needs = [factor.contiguous() for factor, _ in own], [need for _, need in own]
        between = [next(states) for _ in steps[1:]] if saved else []
        if any(needs):
            if any(needs[1:]) and not between:
                between = _between(steps, weights, x)
            grad_x, found = _chain_back(steps, weights, [x, *between], grad, grad_x, needs_x, needs)
            grad_factors += found
        else:
            if needs_x:
                back = tuple(step.transposed for step in reversed(steps))
                grad_x, _ = _chain(back, weights[::-1], grad, None, grad_x, False, design)
            grad_factors += [None] * len(steps)
    return grad_x, grad_factors


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
    if not len(x):
        zeros = [torch.zeros_like(f) if need else None for f, need in zip(factors, needs_factors, strict=True)]
        return *((torch.empty_like(x), torch.empty_like(gates)) if needs_x else (None, None)), zeros
    x, grad, slots = _unit_stride(x), _unit_stride(grad.to(x.dtype)), arrange(indices, gates, len(factors[0]))
    back: Tensor | None = None  # of what every pair's expert was given
    grad_factors: list[Tensor | None] = []
    parts = structure.by_term(list(zip(factors, needs_factors, strict=True)))
    for steps, (_, own) in zip(plan(structure), parts, strict=True):
        weights, needs = [factor.contiguous() for factor, _ in own], [need for _, need in own]
        between = _between(steps, weights, x, slots, slots.inputs) if any(needs[1:]) else []
        back, found = _chain_back(steps, weights, [x, *between], grad, back, needs_x, needs, slots)
        grad_factors += found
    if back is None:
        return None, None, grad_factors
    back = back.view(*indices.shape, structure.in_features)
    grad_gates = (back * x[:, None]).sum(2, dtype=back.dtype)
    return _sum_pairs(back * gates[..., None]), grad_gates, grad_factors


def _chain(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
    design: str | None,
    slots: Slots | None = None,
    x_rows: Rows | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """A term's output, plus the bias and the residual, and the states between its steps if they are to be saved.

    Where there are slots, `x_rows` finds their rows in x, and the output has a row for every pair.
    """
    if design not in (None, *DESIGNS):
        raise ValueError(f"unknown design {design!r}: choose {' or '.join(DESIGNS)}")
    if len(steps) == 2 and design != "steps" and slots is None:
        first, second = steps
        limits = tile_sizes.device_limits(x.device)
        if design is None and tile_sizes.fusing_pays(first, second, x.itemsize, len(x), limits, save):
            design = "fused"
        if design == "fused":
            if not tile_sizes.fused_tiles(first, second, x.itemsize, limits):
                raise ValueError("the state between these factors does not fit on the chip: choose the design 'steps'")
            return launch_fused(first, second, weights, x, bias, residual, save)
    states = _between(steps, weights, x, slots, x_rows)
    n, y_rows = (len(x), None) if slots is None else (slots.size, slots.pairs)
    x_rows = None if states else x_rows
    y = launch_step(steps[-1], weights[-1], (states or [x])[-1], n, bias, residual, slots, x_rows, y_rows)
    return y, states if save else []


def _between(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    x: Tensor,
    slots: Slots | None = None,
    x_rows: Rows | None = None,
) -> list[Tensor]:
    """The states between the steps of a term."""
    n = len(x) if slots is None else slots.size
    states: list[Tensor] = []
    for step, weight in zip(steps[:-1], weights, strict=False):
        before = (states or [x])[-1]
        states.append(launch_step(step, weight, before, n, slots=slots, x_rows=None if states else x_rows))
    return states


def _chain_back(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    grad: Tensor,
    residual: Tensor | None,
    needs_x: bool,
    needs: Sequence[bool],
    slots: Slots | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of a term's input, plus the residual, and those of its factors. states: what every step reads.

    Where there are slots, the gradient of the input has a row for every pair.
    """
    found: list[Tensor | None] = [None] * len(steps)
    n = len(grad) if slots is None else slots.size
    for i in reversed(range(len(steps))):
        step, weight, added = steps[i], weights[i], None if i else residual
        x_rows = grad_rows = grad_x_rows = None
        if slots is not None:
            x_rows, grad_x_rows = (None, None) if i else (slots.inputs, slots.pairs)
            grad_rows = slots.tokens if i == len(steps) - 1 else None
        onward = needs_x or any(needs[:i])
        joint = onward and needs[i] and bool(tiles_back(step, weight, n, True, slots))
        before = None
        if needs[i]:
            beside = added if joint else None
            found[i], before = launch_back(
                step, weight, states[i], grad, n, beside, joint, slots, x_rows, grad_rows, grad_x_rows
            )
        if not onward:
            return residual, found
        if not joint:
            before = launch_step(step.transposed, weight, grad, n, None, added, slots, grad_rows, grad_x_rows)
        assert before is not None
        grad = before
    return grad, found


def _sum_pairs(pairs: Tensor) -> Tensor:
    """(n, active, features) to (n, features); of the same dtype under autocast, too, which would widen a sum."""
    return pairs.squeeze(1) if pairs.shape[1] == 1 else pairs.sum(1, dtype=pairs.dtype)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
