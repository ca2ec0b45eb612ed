"""`linear`, the structured counterpart of `torch.nn.functional.linear`, and its derivatives.

In eager mode a backend is an autograd function. It has a fifth of the overhead of the operator
(``torch.ops.einlinear.linear``), which serves torch.compile, fake tensors, and dispatch modes such as FlopCounterMode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from einlinear import structures
from einlinear.import_hooks import when_imported
from einlinear.ops import backends, exported, reference
from einlinear.ops.autograd import direct_apply, plain_gradients
from einlinear.ops.context import (
    CallContext,
    autocast,
    call_context,
    is_differentiated_again,
    is_exported,
    wants_gradients,
)
from einlinear.ops.cpu import fast_path
from einlinear.ops.dispatch import choose, choose_for_compiler, recomputes
from einlinear.ops.operands import Operands, Routing, along_features
from einlinear.structures import Structure


def linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    backend: str | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Multiply with a structured matrix, as `torch.nn.functional.linear` does with a dense one: (..., out_features).

    With a routing, a token is multiplied with the matrices of its experts: y = sum of gate_e * W_e x, plus the bias.

    Args:
        structure: of the matrix.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`; with a routing, stacks
            of these, of shape (experts, *shape of the factor).
        x: (..., in_features), of the same dtype as the factors (or under autocast); nested tensors included.
        bias: (out_features,) or None.
        backend: one of `ops.BACKENDS`, or None for the one that `explain` names. torch.fx, torch.func, forward-mode
            differentiation and tensor subclasses always get the reference; torch.export, torch.jit.trace and torch.onnx
            record plain matrix products.
        routing: the experts of every token, `Routing(indices, gates)`, both of shape (n, active) for the n tokens
            of x; differentiable in the gates.

    Raises:
        RuntimeError: a tensor of a wrong shape, dtype, device, or whose memory was released; a backend that cannot run.
        ValueError: an unknown backend; more or fewer factors than the structure has.
        TypeError: something else than a tensor.
        IndexError: an index of no expert; only on the CPU.

    Example:
        >>> import torch, einlinear as el
        >>> s = el.structure("btt", 16, 16)
        >>> stacks = [torch.randn(3, *factor.shape) for factor in s.factors]
        >>> indices, gates = torch.tensor([[0, 2], [1, 2]]), torch.full((2, 2), 0.5)
        >>> el.ops.linear(s, stacks, torch.randn(2, 16), routing=el.ops.Routing(indices, gates)).shape
        torch.Size([2, 16])
    """

    if backend is None and routing is None and type(x) is Tensor:
        training = wants_gradients(x, bias, *factors)
        call = fast_path.find(structure, factors, x, bias, training)
        if call is not None and training:
            return _apply_fast(call, structure, x, bias, *factors)  # type: ignore[no-any-return]
        if call is not None:
            return fast_path.forward(call, factors, x, bias)[0]

    def multiply(tokens: Tensor) -> Tensor:
        return _linear(Operands(structure, factors, tokens, bias, routing), backend)

    return along_features(multiply, x, structure.in_features, structure.out_features)


def dense_weight(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """W of shape (out_features, in_features): the weights of all terms, added up; differentiable.

    Raises:
        RuntimeError, ValueError, TypeError: factors that do not fit the structure, as for `linear`.
    """
    if not any(isinstance(factor, fx.Proxy) for factor in factors):  # of which torch.fx knows nothing
        operands = Operands(structure, factors, x=None)  # type: ignore[arg-type]
        operands.check(memory=call_context(*factors) is CallContext.EAGER)
    return reference.dense_weight(structure, factors)


def _linear(operands: Operands, backend: str | None) -> Tensor:
    """Return y of shape (n, out_features), computed as the context of the call demands."""
    if backend is not None:
        backends.check_name(backend)
    if isinstance(operands.x, fx.Proxy):
        return reference.apply(operands)
    tensors = operands.tensors()
    context = call_context(*tensors)
    eager, plain = context is CallContext.EAGER, context is CallContext.PLAIN
    training = not plain and wants_gradients(*tensors)
    operands = autocast(operands)
    structure, factors, x, bias, routing = operands
    if plain or (routing is not None and x.is_meta):
        # other backends read the indices, which have no values on "meta"
        backend = "reference"
    elif backend is not None:
        backends.check_support(backend, operands)
    elif not eager and torch.compiler.is_compiling():
        sizes = structure.in_features, structure.out_features
        backend = choose_for_compiler(structure.spec, *sizes, x.dtype, x.device.type, routing is not None)
    else:
        tokens = x.shape[0] if routing is None else max(1, routing.indices.numel() // max(1, operands.experts))
        backend = choose(structure, tokens, x.dtype, x.device, training, routing is not None).backend
    if backend == "reference":
        operands.check(memory=eager)
        exports = plain and is_exported() and routing is None
        return exported.apply(operands) if exports else reference.apply(operands)
    if not eager:
        indices, gates = routing or (None, None)
        return linear_op(x, list(factors), bias, indices, gates, structure.spec, structure.out_features, backend)  # type: ignore[no-any-return]
    if training:
        return _Linear.apply(backend, operands, *operands.tensors())  # type: ignore[no-untyped-call, no-any-return]
    return backends.find(backend).forward(operands, False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, operands: Operands, *tensors: Tensor | None) -> Tensor:
        ctx.structure, ctx.backend = operands.structure, backend
        y, saved = backends.find(backend).forward(operands, not recomputes(backend, operands.structure))
        ctx.saved = [(tensor.shape, tensor.dtype) for tensor in saved]
        ctx.save_for_backward(*tensors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        inputs, saved = tensors[: len(needed)], tensors[len(needed) :]
        if [(tensor.shape, tensor.dtype) for tensor in saved] != ctx.saved:
            raise RuntimeError("an intermediate was unpacked in another shape or dtype than it was saved in")
        return None, None, *_gradients(ctx.backend, ctx.structure, inputs, saved, needed, *grads)


class _FastLinear(torch.autograd.Function):
    """`_Linear` for what `fast_path.find` returns."""

    @staticmethod
    def forward(
        ctx: Any, call: fast_path.Call, structure: Structure, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.call, ctx.structure = call, structure
        ctx.save_for_backward(x, bias, *factors)
        y, ctx.pointers = fast_path.forward(call, factors, x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        gradients = fast_path.backward(ctx.call, ctx.pointers, inputs, grad, needed)
        if gradients is None:
            gradients = _gradients("cpu", ctx.structure, inputs, (), needed, grad)
        return None, None, *gradients


_apply_fast = direct_apply(_FastLinear)


def _gradients(
    backend: str,
    structure: Structure,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Return the gradients that are needed, of the tensors of `Operands`, given that of y."""
    if is_differentiated_again(grad, *inputs):
        return plain_gradients(partial(_reference, structure), inputs, needed, grad)
    end = 2 + len(structure.shapes)
    needs_x = needed[0] or any(needed[end:])
    x, _, *others = inputs
    operands = Operands.of(structure, x, None, *others)
    gradients = backends.find(backend).backward(operands, grad, saved, needs_x, needed[2:end])
    grad_bias = grad.sum(0) if needed[1] else None
    grad_routing = () if operands.routing is None else (None, gradients.gates)
    return [gradients.x, grad_bias, *gradients.factors, *grad_routing]


def _reference(structure: Structure, *inputs: Any) -> Tensor:
    return reference.apply(Operands.of(structure, *inputs))


structure_of = lru_cache(maxsize=4096)(structures.structure)


def _operands_of(
    x: Tensor, factors: Any, bias: Any, indices: Any, gates: Any, spec: str, out_features: int
) -> Operands:
    """Return the operands among an operator's arguments."""
    routing = None if indices is None or gates is None else Routing(indices, gates)
    # a compiler's symbols become numbers, for good
    return Operands(structure_of(spec, int(features_of(x)), int(out_features)), factors, x, bias, routing)


def features_of(x: Tensor) -> int:
    """Return the number of features of an operator's input or gradient."""
    if x.dim() != 2:
        raise RuntimeError(f"an input or a gradient has shape {tuple(x.shape)}, not (n, features)")
    return x.shape[1]


@torch.library.custom_op(
    "einlinear::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] factors, Tensor? bias, Tensor? indices, Tensor? gates, str spec, SymInt out_features, "
    "str backend) -> Tensor",
)
def linear_op(
    x: Tensor, factors: Any, bias: Any, indices: Any, gates: Any, spec: str, out_features: int, backend: str
) -> Tensor:
    """Compute `linear` without autograd: (n, in_features) to (n, out_features)."""
    operands = _operands_of(x, factors, bias, indices, gates, spec, out_features)
    backends.check_support(backend, operands)
    return backends.find(backend).forward(operands, False)[0]


@linear_op.register_fake
def _(x: Tensor, factors: Any, bias: Any, indices: Any, gates: Any, spec: str, out_features: int, _: str) -> Tensor:
    _operands_of(x, factors, bias, indices, gates, spec, out_features).check(memory=False)
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op(
    "einlinear::linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] factors, Tensor? indices, Tensor? gates, str spec, str backend, "
    "bool needs_x, bool[] needs_factors) -> Tensor[]",
)
def linear_backward_op(grad: Tensor, x: Tensor, factors: Any, indices: Any, gates: Any, *others: Any) -> list[Tensor]:
    """Return the needed gradients, of x, of the gates and of the factors; intermediates are recomputed."""
    spec, backend, needs_x, needs_factors = others
    operands = _operands_of(x, factors, None, indices, gates, spec, features_of(grad))
    backends.check_support(backend, operands)
    gradients = backends.find(backend).backward(operands, grad, [], needs_x, needs_factors)
    return [g for g in (gradients.x, gradients.gates, *gradients.factors) if g is not None]


@linear_backward_op.register_fake
def _(grad: Tensor, x: Tensor, factors: Any, indices: Any, gates: Any, *others: Any) -> list[Tensor]:
    spec, _, needs_x, needs_factors = others
    _operands_of(x, factors, None, indices, gates, spec, features_of(grad)).check(grad, memory=False)
    tensors = zip((x, gates, *factors), (needs_x, needs_x and gates is not None, *needs_factors), strict=True)
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor, needed in tensors if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factors, _, indices, gates, ctx.spec, _, ctx.backend = inputs
    ctx.save_for_backward(x, indices, gates, *factors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, indices, gates, *factors = ctx.saved_tensors
    needs_x, needs_factors, needs_bias, _, needs_gates, *_ = ctx.needs_input_grad
    needs_x = bool(needs_x or needs_gates)
    needs_factors = [*needs_factors] if isinstance(needs_factors, list | tuple) else [True] * len(factors)
    arguments = (grad, x, factors, indices, gates, ctx.spec, ctx.backend, needs_x, needs_factors)
    gradients = iter(linear_backward_op(*arguments))
    needed = (needs_x, needs_x and gates is not None, *needs_factors)
    grad_x, grad_gates, *grad_factors = (next(gradients) if needs else None for needs in needed)
    return grad_x, grad_factors, grad.sum(0) if needs_bias else None, None, grad_gates, None, None, None


linear_op.register_autograd(_op_backward, setup_context=_setup_context)


def _register_flops() -> None:
    # imports triton
    from torch.utils.flop_counter import register_flop_formula

    def vectors(x: Any, indices: Any) -> int:
        return int(x[0] if indices is None else math.prod(indices))

    @register_flop_formula(torch.ops.einlinear.linear)
    def _(x: Any, factors: Any, bias: Any, indices: Any, gates: Any, spec: str, out: int, *_: Any, **__: Any) -> int:
        return 2 * vectors(x, indices) * structure_of(spec, x[1], out).macs

    @register_flop_formula(torch.ops.einlinear.linear_backward)
    def _(grad: Any, x: Any, factors: Any, indices: Any, gates: Any, spec: str, *others: Any, **_: Any) -> int:
        _, needs_x, needs_factors = others
        return 2 * vectors(x, indices) * backward_macs(structure_of(spec, x[1], grad[1]), needs_x, needs_factors)


def backward_macs(structure: Structure, needs_x: bool, needs_factors: Sequence[bool]) -> int:
    """Return the MACs of a backward pass for one input vector, without those of what it computes again."""
    # the step of a factor has two products: the gradient of its input, and that of the factor
    inputs = sum(f.macs for term in structure.terms for f in term.factors[0 if needs_x else 1 :])
    return inputs + sum(f.macs for f, needed in zip(structure.factors, needs_factors) if needed)


when_imported("torch.utils.flop_counter", _register_flops)
