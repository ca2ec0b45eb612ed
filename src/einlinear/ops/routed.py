"""Products with one of several matrices of the same structure, chosen for every token: the experts of a mixture.

A gate scales what goes into an expert, not what comes out: then the gradient of the gate is a product of two vectors
that backward has at hand, and nothing but the input needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einlinear.import_hooks import when_imported
from einlinear.ops import backends, dispatch, operands, reference
from einlinear.ops.autograd import features, plain_gradients, structure_of
from einlinear.ops.constants import assume_constant_result
from einlinear.structures import Structure


def grouped_linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """For every token the sum over its experts of gate * W_expert x, plus a bias.

    Args:
        structure: of every expert.
        factors: one tensor per factor, in the order of `structure.factors`, each of shape (number of experts, *shape
            of the factor).
        x: (n, in_features), of the dtype of the factors (or under autocast).
        indices: (n, active), int64, the experts of every token; any load, none for some and all for one included.
        gates: (n, active), their weights.
        bias: (out_features,) or None.

    Returns:
        (n, out_features); differentiable in factors, x, gates and bias.

    Raises:
        RuntimeError, ValueError, TypeError: operands that do not fit, as for `ops.linear`.
        IndexError: an expert that there is not; only on the CPU.
    """
    way = dispatch.seen(x, indices, gates, bias, *factors)
    x, factors, bias = dispatch.of_one_dtype(x, factors, bias)
    gates = gates.to(x.dtype)
    training = dispatch.wants_gradients(x, gates, bias, *factors)
    if way == "plain" or x.is_meta:
        backend = "reference"
    elif torch.compiler.is_compiling():
        spec, in_features, out_features = structure.spec, structure.in_features, structure.out_features
        backend = _choose_compiled(spec, in_features, out_features, x.dtype, x.device.type)
    else:
        experts = len(factors[0]) if factors else 0
        load = max(1, indices.numel() // max(1, experts))
        backend = _choose(structure, load, x.dtype, x.device, training)
    if backend == "reference":
        operands.check(structure, factors, x, bias, routing=(indices, gates), memory=way == "eager")
        return _reference(structure, factors, x, indices, gates, bias)
    if way == "traced":
        op: Tensor = grouped_op(x, list(factors), indices, gates, bias, structure.spec, structure.out_features, backend)
        return op
    if training:
        y: Tensor = _Grouped.apply(backend, structure, x, indices, gates, bias, *factors)  # type: ignore[no-untyped-call]
        return y
    return backends.find(backend).forward_grouped(structure, factors, x, indices, gates, bias)


def _choose(structure: Structure, load: int, dtype: torch.dtype, device: torch.device, training: bool) -> str:
    """The fastest for an expert of this many tokens; if not forced, torch's batched matmuls rather than plain torch."""
    chosen = dispatch.choose(structure, load, dtype, device, training).backend
    if chosen == "reference" and dispatch.forced().backend is None:
        return "batched" if backends.unsupported("batched", structure, dtype, device) is None else chosen
    return chosen


@assume_constant_result
def _choose_compiled(spec: str, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> str:
    structure = structure_of(spec, in_features, out_features)
    return _choose(structure, dispatch.MANY_TOKENS, dtype, torch.device(device), training=True)


def _reference(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """In plain operators, which compute all experts for all tokens."""
    y = x.new_zeros(x.shape[0], structure.out_features)
    for e, own in enumerate(zip(*(factor.unbind() for factor in factors), strict=True)):
        gate = torch.where(indices == e, gates, 0).sum(1, keepdim=True, dtype=gates.dtype)
        y = y + gate * reference.apply(structure, own, x, None)
    return y if bias is None else y + bias


def _plain(
    structure: Structure, x: Tensor, indices: Tensor, gates: Tensor, bias: Tensor | None, *factors: Tensor
) -> Tensor:
    return _reference(structure, factors, x, indices, gates, bias)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        structure: Structure,
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.structure = backend, structure
        ctx.save_for_backward(x, indices, gates, bias, *factors)
        return backends.find(backend).forward_grouped(structure, factors, x, indices, gates, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, indices, gates, bias, *factors = ctx.saved_tensors
        _, _, needs_x, _, needs_gates, needs_bias, *needs_factors = ctx.needs_input_grad
        if dispatch.differentiable(grad, x, gates, *factors):
            plain, inputs = partial(_plain, ctx.structure), (x, indices, gates, bias, *factors)
            return None, None, *plain_gradients(plain, inputs, ctx.needs_input_grad[2:], grad)
        grad_x, grad_gates, grad_factors = backends.find(ctx.backend).backward_grouped(
            ctx.structure, factors, x, indices, gates, grad, needs_x or needs_gates, needs_factors
        )
        return None, None, grad_x, None, grad_gates, grad.sum(0) if needs_bias else None, *grad_factors


@torch.library.custom_op("einlinear::grouped_linear", mutates_args=())
def grouped_op(
    x: Tensor,
    factors: list[Tensor],
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    spec: str,
    out_features: int,
    backend: str,
) -> Tensor:
    """`grouped_linear` as an operator, for what traces."""
    structure = structure_of(spec, features(x), out_features)
    backends.check_support(backend, structure, x.dtype, x.device)
    return backends.find(backend).forward_grouped(structure, factors, x, indices, gates, bias)


@grouped_op.register_fake
def _(
    x: Tensor,
    factors: list[Tensor],
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    spec: str,
    out_features: int,
    backend: str,
) -> Tensor:
    structure = structure_of(spec, features(x), out_features)
    operands.check(structure, factors, x, bias, routing=(indices, gates), memory=False)
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("einlinear::grouped_linear_backward", mutates_args=())
def grouped_backward_op(
    grad: Tensor, x: Tensor, factors: list[Tensor], indices: Tensor, gates: Tensor, spec: str, backend: str
) -> list[Tensor]:
    """The gradients of x, of the gates and of the factors."""
    structure = structure_of(spec, features(x), features(grad))
    backends.check_support(backend, structure, x.dtype, x.device)
    needs_factors = [True] * len(factors)
    grad_x, grad_gates, grad_factors = backends.find(backend).backward_grouped(
        structure, factors, x, indices, gates, grad, True, needs_factors
    )
    return [g for g in (grad_x, grad_gates, *grad_factors) if g is not None]


@grouped_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, factors: list[Tensor], indices: Tensor, gates: Tensor, spec: str, backend: str
) -> list[Tensor]:
    structure = structure_of(spec, features(x), features(grad))
    operands.check(structure, factors, x, grad=grad, routing=(indices, gates), memory=False)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gates, *factors)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, indices, gates, _, ctx.spec, _, ctx.backend = inputs
    ctx.save_for_backward(x, indices, gates, *factors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, indices, gates, *factors = ctx.saved_tensors
    grad_x, grad_gates, *grad_factors = grouped_backward_op(grad, x, factors, indices, gates, ctx.spec, ctx.backend)
    grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, grad_factors, None, grad_gates, grad_bias, None, None, None


grouped_op.register_autograd(_op_backward, setup_context=_setup_context)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula  # which imports triton

    @register_flop_formula(torch.ops.einlinear.grouped_linear)
    def _(
        x: Any, factors: Any, indices: Any, gates: Any, bias: Any, spec: str, out_features: int, backend: str, **_: Any
    ) -> int:
        return 2 * int(math.prod(indices)) * structure_of(spec, x[1], out_features).macs

    @register_flop_formula(torch.ops.einlinear.grouped_linear_backward)
    def _(grad: Any, x: Any, factors: Any, indices: Any, gates: Any, spec: str, backend: str, **_: Any) -> int:
        return 4 * int(math.prod(indices)) * structure_of(spec, x[1], grad[1]).macs


when_imported("torch.utils.flop_counter", _register_flops)
