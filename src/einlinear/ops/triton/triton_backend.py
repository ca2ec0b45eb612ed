"""The Triton backend: structured products on NVIDIA GPUs, forward and backward. docs/triton.md counts the bytes moved.

Forward, one launch per factor. An intermediate is written once, in a layout that both steps reach in whole sectors
(`strided_steps.py`). Backward, one launch per factor gives both gradients of a step if a tile can hold a whole matrix
of the factor, so that nothing is read twice; otherwise two launches do.

This package can be imported without triton. `unsupported` says what is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.product import Gradients, Product
from einlinear.ops.triton.launch import Launcher, Operand, interpreting
from einlinear.ops.triton.slots import EVERY_SLOT, Rows, arrange
from einlinear.ops.triton.strided_steps import StridedStep, plan
from einlinear.structures import Structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the kernels cannot run, or None if they can. They support every structure."""
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


def forward(product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates between factors if they are to be saved.

    Args:
        product: the operands; x may have any strides.
        save: whether to return what `backward` can reuse. It is opaque.
    """
    structure, factors, _, bias, routing = product
    if not len(product.x):
        return product.x.new_empty(0, structure.out_features), []
    launcher, x, pairs = _prepare(product)
    # with a routing, the pairs of a token are added up below, and the bias after them
    step_bias = None if routing else bias
    y: Tensor | None = None
    saved: list[Tensor] = []
    for steps, (_, term_factors) in zip(plan(structure), structure.by_term(factors), strict=True):
        weights = [factor.contiguous() for factor in term_factors]
        sources = _sources(launcher, steps, weights, x)
        y = launcher.forward(steps[-1], weights[-1], sources[-1], pairs, step_bias if y is None else None, y)
        saved += [source.tensor for source in sources[1:]]
    assert y is not None
    if routing is not None:
        y = _sum_pairs(y.view(*routing.indices.shape, structure.out_features))
        y = y if bias is None else y.add_(bias)
    return y, saved if save and routing is None else []


def backward(
    product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed, given that of y.

    Args:
        product: the operands.
        grad: the gradient of y.
        saved: what `forward` returned; if that is empty, intermediates that are needed are recomputed.
        needs_x, needs_factors: which gradients are needed; the others are None.
    """
    structure, factors, _, _, routing = product
    if not len(product.x):
        zeros = [torch.zeros_like(f) if need else None for f, need in zip(factors, needs_factors, strict=True)]
        grad_gates = torch.empty_like(routing.gates) if needs_x and routing is not None else None
        return Gradients(torch.empty_like(product.x) if needs_x else None, grad_gates, zeros)
    launcher, x, pairs = _prepare(product)
    grad_y = Operand(_unit_stride(grad.to(product.x.dtype)), launcher.slots.tokens if launcher.slots else EVERY_SLOT)
    intermediates = iter(saved)
    # with a routing, a row for every pair
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = []
    by_term = structure.by_term(list(zip(factors, needs_factors, strict=True)))
    for steps, (_, entries) in zip(plan(structure), by_term, strict=True):
        weights, needs = [factor.contiguous() for factor, _ in entries], [need for _, need in entries]
        if saved:
            sources = [x, *(Operand(next(intermediates)) for _ in steps[1:])]
        else:
            sources = _sources(launcher, steps, weights, x) if any(needs[1:]) else [x]
        grad_x, term_grads = _backward_term(launcher, steps, weights, sources, grad_y, pairs, grad_x, needs_x, needs)
        grad_factors += term_grads
    if routing is None or grad_x is None:
        return Gradients(grad_x, None, grad_factors)
    grad_inputs = grad_x.view(*routing.indices.shape, structure.in_features)
    grad_gates = (grad_inputs * x.tensor[:, None]).sum(2, dtype=grad_inputs.dtype)
    return Gradients(_sum_pairs(grad_inputs * routing.gates[..., None]), grad_gates, grad_factors)


def _prepare(product: Product) -> tuple[Launcher, Operand, Rows]:
    """The launcher, the input, and the rows of the slots in the output and in the gradient of the input."""
    x = _unit_stride(product.x)
    if product.routing is None:
        return Launcher(len(x)), Operand(x), EVERY_SLOT
    slots = arrange(*product.routing, product.experts)
    return Launcher(slots.size, slots), Operand(x, slots.inputs), slots.pairs


def _sources(launcher: Launcher, steps: Sequence[StridedStep], weights: Sequence[Tensor], x: Operand) -> list[Operand]:
    """The source of every step of a term: the input, then the intermediates."""
    sources = [x]
    for step, weight in zip(steps[:-1], weights[:-1], strict=True):
        sources.append(Operand(launcher.forward(step, weight, sources[-1])))
    return sources


def _backward_term(
    launcher: Launcher,
    steps: Sequence[StridedStep],
    weights: Sequence[Tensor],
    sources: Sequence[Operand],
    grad: Operand,
    rows: Rows,
    residual: Tensor | None,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of a term's input plus the residual, and the gradients of its factors.

    The sources are those of every step up to the last one whose factor needs a gradient. The residual is the gradient
    of the input from other terms, in which the slots have these rows.
    """
    grad_factors: list[Tensor | None] = [None] * len(steps)
    for i in reversed(range(len(steps))):
        # the gradient of the first step's source is that of the term's input
        ends = (EVERY_SLOT, None) if i else (rows, residual)
        needs_source = needs_x or any(needs[:i])
        joint = needs_source and needs[i] and launcher.fits_joint(steps[i], weights[i])
        grad_source: Tensor | None = None
        if needs[i]:
            ends_joint = ends if joint else (EVERY_SLOT, None)
            grad_factors[i], grad_source = launcher.backward(steps[i], weights[i], sources[i], grad, joint, *ends_joint)
        if not needs_source:
            return residual, grad_factors
        if grad_source is None:
            grad_source = launcher.forward(steps[i].transposed, weights[i], grad, ends[0], residual=ends[1])
        grad = Operand(grad_source)
    return grad.tensor, grad_factors


def _sum_pairs(pairs: Tensor) -> Tensor:
    """(n, active, features) to (n, features), of the same dtype also under autocast, which would widen a sum."""
    return pairs.squeeze(1) if pairs.shape[1] == 1 else pairs.sum(1, dtype=pairs.dtype)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
