"""`feed_forward`, a feed-forward block in one call, and its derivatives.

As for `linear`, a fused block is an autograd function in eager mode, and an operator for torch.compile, fake tensors
and dispatch modes. Both save nothing but x and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from einlinear.import_hooks import when_imported
from einlinear.ops import backends, reference
from einlinear.ops.autograd import plain_gradients
from einlinear.ops.context import (
    CallContext,
    autocast_dtype,
    autocast_operands,
    call_context,
    is_differentiated_again,
    wants_gradients,
)
from einlinear.ops.feed_forward_structure import FeedForwardStructure
from einlinear.ops.fused_dispatch import backend_of_fused_blocks, choose_fused_for_compiler, reason_not_to_fuse
from einlinear.ops.linear_function import backward_macs, features_of, linear, structure_of
from einlinear.ops.operands import Extent, Operands, Weights, along_features, are_contiguous_cpu, extents, weight_shapes


def feed_forward(
    x: Tensor,
    up: Weights,
    down: Weights,
    gate: Weights | None = None,
    activation: str = "gelu",
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute a feed-forward block y = down(activation(up(x))), with a gate y = down(activation(gate(x)) * up(x)).

    On the CPU the compiled kernel runs the whole block on one tile of tokens after the other, so hidden features are
    never in memory, and training saves x and the weights only. The backend "triton" does so with chunks of tokens whose
    hidden features fit in the L2 cache (experimental: not measured on a GPU yet), but only if it is asked for. Where
    `ops.reason_not_to_fuse` gives a reason, as on CUDA by default, and for torch.func, torch.fx, export and tensor
    subclasses, the layers run one after the other, with `linear`.

    Args:
        x: (..., in_features), as for `linear`; nested tensors included.
        up, gate: the weights of the layers from in_features to the hidden features.
        down: the weights of the layer from the hidden features to (..., out_features).
        activation: one of `ops.ACTIVATIONS`.
        residual: whether x is added to y.
        backend: as for `linear`. "cpu" and "triton" fuse whatever can be fused, other backends run one layer after the
            other.

    Raises:
        ValueError: layers that do not fit one another, an unknown activation or backend.
        RuntimeError, ValueError, TypeError: tensors that do not fit, as for `linear`; the message names the layer.

    Example:
        >>> import torch, einlinear as el
        >>> up, down = el.structure("btt", 64, 256), el.structure("btt", 256, 64)
        >>> weights = [el.ops.Weights(s, [torch.randn(shape) for shape in s.shapes]) for s in (up, down)]
        >>> el.ops.feed_forward(torch.randn(100, 64), *weights, activation="silu").shape
        torch.Size([100, 64])
    """
    layers = {"up": up, "down": down} if gate is None else {"up": up, "gate": gate, "down": down}
    tensors: list[Tensor] = []
    for name, weights in layers.items():
        if not isinstance(weights, Weights):
            raise TypeError(f"{name} must be Weights(structure, factors, bias), not {type(weights).__name__}")
        structure, factors, bias = weights
        if len(factors) != len(structure.factors):
            raise ValueError(f"{name}: {structure} has {len(structure.factors)} factors, not {len(factors)}")
        tensors += factors if bias is None else (*factors, bias)
    structures = tuple([weights.structure for weights in layers.values()])
    has_bias = tuple([weights.bias is not None for weights in layers.values()])
    block = FeedForwardStructure(structures, has_bias, activation, residual)
    block.check_sizes()
    if backend is not None:
        backends.check_name(backend)

    def compute(tokens: Tensor) -> Tensor:
        return _feed_forward(block, tokens, tensors, backend)

    return along_features(compute, x, block.features[0], block.features[-1])


def _feed_forward(block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor], backend: str | None) -> Tensor:
    """Return y of shape (n, out_features), computed as the context of the call demands."""
    context = CallContext.PLAIN if isinstance(x, fx.Proxy) else call_context(x, *tensors)
    training = context is not CallContext.PLAIN and wants_gradients(x, *tensors)
    fusing = None if context is CallContext.PLAIN else _fusing_backend(block, x, training, backend)
    if fusing is None:
        return _layer_by_layer(block, x, tensors, backend)
    if block.residual and autocast_dtype(x) not in (None, x.dtype):
        # autocast casts operands of products, not of sums
        return _feed_forward(block._replace(residual=False), x, tensors, backend) + x
    x, *tensors = autocast_operands(x, *tensors)
    if context is CallContext.TRACED:
        specs = [structure.spec for structure in block.structures]
        others = block.features[1:], block.has_bias, block.activation, block.residual
        return feed_forward_op(x, tensors, specs, *others, fusing)  # type: ignore[no-any-return]
    if training:
        return _FeedForward.apply(fusing, block, x, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _forward(fusing, block, x, tensors)


def _fusing_backend(block: FeedForwardStructure, x: Tensor, training: bool, backend: str | None) -> str | None:
    """Return the backend that runs the block fused, or None if its layers run one after the other."""
    dtype = autocast_dtype(x) or x.dtype
    if torch.compiler.is_compiling():
        specs = [structure.spec for structure in block.structures]
        return choose_fused_for_compiler(specs, block.features, dtype, x.device.type, backend)
    reason = reason_not_to_fuse(block.structures, x.shape[0], dtype, x.device, training, backend)
    return backend_of_fused_blocks(backend) if reason is None else None


def _layer_by_layer(block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor], backend: str | None) -> Tensor:
    def multiply(operands: Operands) -> Tensor:
        return linear(operands.structure, operands.factors, operands.x, operands.bias, backend)

    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return block.compute(multiply, x, *tensors)
    try:
        return block.compute(multiply, x, *tensors)
    except (RuntimeError, TypeError, ValueError):
        # if operands do not fit, this names the layer
        block.check(x, tensors)
        raise


def _forward(backend: str, block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    if not _are_contiguous_cpu(block, x, tensors) and block.check(x, tensors):
        x, *tensors = [tensor.resolve_neg() for tensor in (x, *tensors)]
    return backends.find_fused_blocks(backend).forward(block, x, tensors)  # type: ignore[no-any-return]


def _backward(
    backend: str,
    block: FeedForwardStructure,
    x: Tensor,
    tensors: Sequence[Tensor],
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    if not _are_contiguous_cpu(block, x, (*tensors, grad)) and block.check(x, tensors, grad):
        x, grad, *tensors = [tensor.resolve_neg() for tensor in (x, grad, *tensors)]
    return backends.find_fused_blocks(backend).backward(block, x, tensors, grad, needed)  # type: ignore[no-any-return]


def _are_contiguous_cpu(block: FeedForwardStructure, x: Tensor, others: Sequence[Tensor]) -> bool:
    """Return whether x, the tensors and the gradient of y need no further check."""
    return x.dim() == 2 and are_contiguous_cpu((x, *others), _extents(block, x.shape[0], x.itemsize), x.dtype)


@lru_cache(maxsize=4096)
def _extents(block: FeedForwardStructure, n: int, itemsize: int) -> tuple[Extent, ...]:
    """Return the extents of x, of the tensors and of the gradient of y."""
    weights = [weight_shapes(*layer) for layer in zip(block.structures, block.has_bias)]
    return extents([(n, block.features[0]), *chain(*weights), (n, block.features[-1])], itemsize)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, block: FeedForwardStructure, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.backend, ctx.block = backend, block
        ctx.save_for_backward(x, *tensors)
        return _forward(backend, block, x, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if is_differentiated_again(grad, *inputs):
            return None, None, *plain_gradients(partial(ctx.block.compute, reference.apply), inputs, needed, grad)
        x, *tensors = inputs
        return None, None, *_backward(ctx.backend, ctx.block, x, tensors, grad, needed)


def _block(
    in_features: int,
    specs: Sequence[str],
    features: Sequence[int],
    has_bias: Sequence[bool],
    activation: str,
    residual: bool,
) -> FeedForwardStructure:
    """Return the block of an operator's arguments; the features are those of the hidden layer and of the output."""
    # a compiler's symbols become numbers, for good
    sizes = [int(size) for size in (in_features, *features)]
    spec_up, *spec_gate, spec_down = specs
    layers = [structure_of(spec, *sizes[:2]) for spec in (spec_up, *spec_gate)]
    block = FeedForwardStructure((*layers, structure_of(spec_down, *sizes[1:])), tuple(has_bias), activation, residual)
    block.check_sizes()
    return block


@torch.library.custom_op(
    "einlinear::feed_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, str[] specs, SymInt[] features, bool[] has_bias, str activation, "
    "bool residual, str backend) -> Tensor",
)
def feed_forward_op(x: Tensor, tensors: Any, *arguments: Any) -> Tensor:
    """Compute a fused block without autograd: (n, in_features) to (n, out_features)."""
    *others, backend = arguments
    block = _block(features_of(x), *others)
    backends.check_support(backend, Operands(block.structures[0], (), x))
    return _forward(backend, block, x, tensors)


@feed_forward_op.register_fake
def _(x: Tensor, tensors: Any, *arguments: Any) -> Tensor:
    *others, _ = arguments
    block = _block(features_of(x), *others)
    block.check(x, tensors, memory=False)
    return x.new_empty(x.shape[0], block.features[-1])


@torch.library.custom_op(
    "einlinear::feed_forward_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] tensors, str[] specs, SymInt[] features, bool[] has_bias, "
    "str activation, bool residual, str backend, bool[] needed) -> Tensor[]",
)
def feed_forward_backward_op(grad: Tensor, x: Tensor, tensors: Any, *arguments: Any) -> list[Tensor]:
    """Return the gradients that are needed, of x and of the tensors."""
    *others, backend, needed = arguments
    block = _block(features_of(x), *others)
    backends.check_support(backend, Operands(block.structures[0], (), x))
    return [gradient for gradient in _backward(backend, block, x, tensors, grad, needed) if gradient is not None]


@feed_forward_backward_op.register_fake
def _(grad: Tensor, x: Tensor, tensors: Any, *arguments: Any) -> list[Tensor]:
    *others, _, needed = arguments
    _block(features_of(x), *others).check(x, tensors, grad, memory=False)
    pairs = zip((x, *tensors), needed, strict=True)
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor, needs in pairs if needs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, *ctx.arguments = inputs
    ctx.save_for_backward(x, *tensors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    needs_x, needs_tensors, *_ = ctx.needs_input_grad
    needed = [needs_x, *needs_tensors]
    gradients = iter(feed_forward_backward_op(grad, x, tensors, *ctx.arguments, needed))
    grad_x, *others = [next(gradients) if needs else None for needs in needed]
    return grad_x, others, *[None] * len(ctx.arguments)


feed_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


def _register_flops() -> None:
    # imports triton
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.einlinear.feed_forward)
    def _(x: Any, tensors: Any, *arguments: Any, **_: Any) -> int:
        *others, _backend = arguments
        return 2 * int(x[0]) * _block(x[1], *others).macs

    @register_flop_formula(torch.ops.einlinear.feed_forward_backward)
    def _(grad: Any, x: Any, tensors: Any, *arguments: Any, **_: Any) -> int:
        *others, _backend, (needs_x, *needs_tensors) = arguments
        block = _block(x[1], *others)
        *first, (needs_down, _) = block.split(needs_tensors)
        # with no gradient of the hidden features, down has the only backward pass
        passed = [layer for layer in zip(block.structures, first) if needs_x or any(layer[1][0]) or layer[1][1]]
        macs = backward_macs(block.structures[-1], bool(passed), needs_down)
        macs += sum(backward_macs(structure, needs_x, needs) for structure, (needs, _) in passed)
        return 2 * int(x[0]) * macs


when_imported("torch.utils.flop_counter", _register_flops)
