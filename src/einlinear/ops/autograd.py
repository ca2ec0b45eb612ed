"""How torch sees an backend: an autograd function in eager mode, an operator where something traces or counts.

The operator (``torch.ops.einlinear.linear``) is what torch.compile, fake tensors, dispatch modes such as
FlopCounterMode and selective activation checkpointing work with. The function does the same with a fifth of the
overhead per call. Neither knows of autocast: a rule of an operator casts to one dtype for good, so it is `linear.py`
that casts to the dtype of the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from einlinear import structures
from einlinear.import_hooks import when_imported
from einlinear.ops import backends, dispatch, operands, reference
from einlinear.structures import Structure


def run(backend: str, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias for x of shape (n, in_features), by an backend that is not the reference; differentiable."""
    if dispatch.wants_gradients(x, bias, *factors):
        y: Tensor = _Linear.apply(structure, backend, x, bias, *factors)  # type: ignore[no-untyped-call]
        return y
    return backends.find(backend).forward(structure, factors, x, bias, save=False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, structure: Structure, backend: str, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        save = not dispatch.recomputes(backend, structure)
        y, saved = backends.find(backend).forward(structure, factors, x, bias, save)
        ctx.structure, ctx.backend, ctx.count = structure, backend, len(factors)
        ctx.shapes = [states.shape for states in saved]
        ctx.save_for_backward(x, bias, *factors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, bias, *rest = ctx.saved_tensors
        factors, saved = rest[: ctx.count], rest[ctx.count :]
        needs_x, needs_bias, *needs_factors = ctx.needs_input_grad[2:]
        if dispatch.differentiable(grad, x, *factors):
            plain = partial(_plain, ctx.structure)
            return None, None, *plain_gradients(plain, (x, bias, *factors), ctx.needs_input_grad[2:], grad)
        if [states.shape for states in saved] != ctx.shapes:
            raise RuntimeError("an intermediate was unpacked in another shape than it was saved in")
        grad_bias = grad.sum(0) if needs_bias else None
        grad_x, grad_factors = backends.find(ctx.backend).backward(
            ctx.structure, factors, x, grad, saved, needs_x, needs_factors
        )
        return (None, None, grad_x, grad_bias, *grad_factors)


def _plain(structure: Structure, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
    return reference.apply(structure, factors, x, bias)


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of a function in plain operators, for a backward pass that is itself differentiated or batched."""
    with torch.enable_grad():
        # by other names, since one input may have been computed from another: each gets its own share alone
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        y = function(*inputs)
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if needs else None for needs in needed]


def structure_of(spec: str, in_features: int, out_features: int) -> Structure:
    """The structure that a spec stands for, from memory. A compiler's symbols become numbers, for good."""
    return _structure_of(spec, int(in_features), int(out_features))


@lru_cache(maxsize=4096)
def _structure_of(spec: str, in_features: int, out_features: int) -> Structure:
    return structures.structure(spec, in_features, out_features)


def features(x: Tensor) -> int:
    """How many an operator's input has. Raises RuntimeError unless it is of shape (n, features)."""
    if x.dim() != 2:
        raise RuntimeError(f"an input or a gradient has shape {tuple(x.shape)}, not (n, features)")
    return x.shape[1]


@torch.library.custom_op("einlinear::linear", mutates_args=())
def linear_op(
    x: Tensor, factors: list[Tensor], bias: Tensor | None, spec: str, out_features: int, backend: str
) -> Tensor:
    """`run` without autograd: (n, in_features) to (n, out_features)."""
    structure = structure_of(spec, features(x), out_features)
    backends.check_support(backend, structure, x.dtype, x.device)
    return backends.find(backend).forward(structure, factors, x, bias, save=False)[0]


@linear_op.register_fake
def _(x: Tensor, factors: list[Tensor], bias: Tensor | None, spec: str, out_features: int, backend: str) -> Tensor:
    operands.check(structure_of(spec, features(x), out_features), factors, x, bias, memory=False)
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("einlinear::linear_backward", mutates_args=())
def linear_backward_op(
    grad: Tensor, x: Tensor, factors: list[Tensor], spec: str, backend: str, needs_x: bool, needs_factors: list[bool]
) -> list[Tensor]:
    """The gradients that are needed, of x first, then of the factors; intermediate states are computed again."""
    structure = structure_of(spec, features(x), features(grad))
    backends.check_support(backend, structure, x.dtype, x.device)
    grad_x, grad_factors = backends.find(backend).backward(structure, factors, x, grad, [], needs_x, needs_factors)
    return [g for g in (grad_x, *grad_factors) if g is not None]


@linear_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, factors: list[Tensor], spec: str, backend: str, needs_x: bool, needs_factors: list[bool]
) -> list[Tensor]:
    operands.check(structure_of(spec, features(x), features(grad)), factors, x, grad=grad, memory=False)
    inputs = zip((x, *factors), (needs_x, *needs_factors), strict=True)
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor, needed in inputs if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, _, ctx.spec, _, ctx.backend = inputs
    ctx.save_for_backward(x, *factors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *factors = ctx.saved_tensors
    needs_x, needs_factors, needs_bias, *_ = ctx.needs_input_grad
    needs = [bool(needs_x), *([*needs_factors] if isinstance(needs_factors, list | tuple) else [True] * len(factors))]
    found = iter(linear_backward_op(grad, x, factors, ctx.spec, ctx.backend, needs[0], needs[1:]))
    grad_x, *grad_factors = (next(found) if needed else None for needed in needs)
    return grad_x, grad_factors, grad.sum(0) if needs_bias else None, None, None, None


linear_op.register_autograd(_op_backward, setup_context=_setup_context)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula  # which imports triton

    @register_flop_formula(torch.ops.einlinear.linear)
    def _(x: Any, factors: Any, bias: Any, spec: str, out_features: int, *args: Any, **kwargs: Any) -> int:
        return 2 * int(x[0]) * structure_of(spec, x[1], out_features).macs

    @register_flop_formula(torch.ops.einlinear.linear_backward)
    def _(
        grad: Any, x: Any, factors: Any, spec: str, backend: str, needs_x: bool, needs_factors: list[bool], **_: Any
    ) -> int:
        # of every factor's step, one product gives the gradient of the state before it, one that of the factor
        structure = structure_of(spec, x[1], grad[1])
        states = sum(f.macs for term in structure.terms for f in term.factors[0 if needs_x else 1 :])
        return 2 * int(x[0]) * (states + sum(f.macs for f, needed in zip(structure.factors, needs_factors) if needed))


when_imported("torch.utils.flop_counter", _register_flops)
