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

from einlinear.ops.product import Gradients, Product
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


def forward(product: Product, save: bool, design: str | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates between factors if they are to be saved.

    Args:
        product: the operands; x may have any strides.
        save: whether to return what `backward` can reuse. It is opaque.
        design: "steps" or "fused" (ValueError where it does not fit); None takes the one that moves fewer bytes.
    """
    structure, factors, x, bias, routing = product
    if not len(x):
        return x.new_empty(0, structure.out_features), []
    x, slots = _unit_stride(x), _slots(product)
    y: Tensor | None = None
    saved: list[Tensor] = []
    for steps, (_, term_factors) in zip(plan(structure), structure.by_term(factors), strict=True):
        weights = [factor.contiguous() for factor in term_factors]
        # the pairs of a token are added up below, and the bias after them
        first_bias = bias if y is None and slots is None else None
        x_rows = None if slots is None else slots.inputs
        y, intermediates = _chain(steps, weights, x, first_bias, y, save and slots is None, design, slots, x_rows)
        saved += intermediates
    assert y is not None
    if routing is not None:
        y = _sum_pairs(y.view(*routing.indices.shape, structure.out_features))
        y = y if bias is None else y.add_(bias)
    return y, saved


def backward(
    product: Product,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
    design: str | None = None,
) -> Gradients:
    """Return the gradients that are needed, given that of y.

    Args:
        product: the operands.
        grad: the gradient of y.
        saved: what `forward` returned; if that is empty, intermediates that are needed are recomputed.
        needs_x, needs_factors: which gradients are needed; the others are None.
        design: as in `forward`, where only the gradient of x is needed.
    """
    structure, factors, x, _, routing = product
    if not len(x):
        zeros = [torch.zeros_like(f) if need else None for f, need in zip(factors, needs_factors, strict=True)]
        grad_gates = torch.empty_like(routing.gates) if needs_x and routing is not None else None
        return Gradients(torch.empty_like(x) if needs_x else None, grad_gates, zeros)
    x, grad, slots = _unit_stride(x), _unit_stride(grad.to(x.dtype)), _slots(product)
    intermediates = iter(saved)
    # with slots, a row for every pair
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = []
    by_term = structure.by_term(list(zip(factors, needs_factors, strict=True)))
    for steps, (_, pairs) in zip(plan(structure), by_term, strict=True):
        weights, needs = [factor.contiguous() for factor, _ in pairs], [need for _, need in pairs]
        between = [next(intermediates) for _ in steps[1:]] if saved else []
        if any(needs) or slots is not None:
            if any(needs[1:]) and not between:
                between = _between(steps, weights, x, slots, None if slots is None else slots.inputs)
            grad_x, term_grads = _chain_back(steps, weights, [x, *between], grad, grad_x, needs_x, needs, slots)
            grad_factors += term_grads
            continue
        if needs_x:
            transposed = tuple(step.transposed for step in reversed(steps))
            grad_x, _ = _chain(transposed, weights[::-1], grad, None, grad_x, False, design)
        grad_factors += [None] * len(steps)
    if routing is None or grad_x is None:
        return Gradients(grad_x, None, grad_factors)
    grad_inputs = grad_x.view(*routing.indices.shape, structure.in_features)
    grad_gates = (grad_inputs * x[:, None]).sum(2, dtype=grad_inputs.dtype)
    return Gradients(_sum_pairs(grad_inputs * routing.gates[..., None]), grad_gates, grad_factors)


def _slots(product: Product) -> Slots | None:
    """Return the pairs of a routing in the order in which the kernels take them."""
    return None if product.routing is None else arrange(*product.routing, product.experts)


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
