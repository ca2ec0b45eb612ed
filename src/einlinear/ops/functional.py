"""`linear`: the structured counterpart of `torch.nn.functional.linear`, in eager mode, traced and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from einlinear.ops import autograd, exported, operands, reference
from einlinear.ops.backends import REGISTRY, check_name, check_support
from einlinear.ops.context import (
    CallContext,
    assume_constant_result,
    autocast,
    call_context,
    forced,
    is_exported,
    wants_gradients,
)
from einlinear.ops.dispatch import choose
from einlinear.ops.product import Assignment, Product
from einlinear.structures import Structure

# a compiler traces once for any number of tokens: the choice is that for many
_MANY_TOKENS = 2048


def linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    backend: str | None = None,
    routing: Assignment | None = None,
) -> Tensor:
    """Multiply with a structured matrix, as `torch.nn.functional.linear` does with a dense one.

    With a routing, a token is multiplied with the matrices of its experts: y = sum of gate_e * W_e x, plus the bias.

    Args:
        structure: of the matrix.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`; with a routing, stacks
            of these, of shape (experts, *shape of the factor).
        x: (..., in_features), of the same dtype as the factors (or under autocast); nested tensors included.
        bias: (out_features,) or None.
        backend: one of `ops.BACKENDS`, or None for the one that `explain` names. torch.fx, torch.func, forward-mode
            differentiation and tensor subclasses always get the reference; torch.export, torch.jit.trace and
            torch.onnx record plain matrix products.
        routing: the experts of every token, `Assignment(indices, gates)`, both of shape (n, active) for the n tokens
            of x; differentiable in the gates.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: a tensor of a wrong shape, dtype or device, or whose memory was released; or the backend cannot
            run this (see `unsupported`).
        ValueError: an unknown backend; more or fewer factors than the structure has.
        TypeError: something else than a tensor.
        IndexError: an index of no expert; only on the CPU.

    Example:
        >>> import torch, einlinear as el
        >>> s = el.structure("btt", 16, 16)
        >>> stacks = [torch.randn(3, *factor.shape) for factor in s.factors]
        >>> indices, gates = torch.tensor([[0, 2], [1, 2]]), torch.full((2, 2), 0.5)
        >>> el.ops.linear(s, stacks, torch.randn(2, 16), routing=el.ops.Assignment(indices, gates)).shape
        torch.Size([2, 16])
    """

    def multiply(tokens: Tensor) -> Tensor:
        return _linear(Product(structure, factors, tokens, bias, routing), backend)

    return along_features(multiply, x, structure.in_features, structure.out_features)


def dense_weight(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """W of shape (out_features, in_features): the weights of all terms, added up; differentiable.

    Raises:
        RuntimeError, ValueError, TypeError: factors that do not fit the structure, as for `linear`.
    """
    if not any(isinstance(factor, fx.Proxy) for factor in factors):  # of which torch.fx knows nothing
        operands.check(structure, factors, memory=call_context(*factors) is CallContext.EAGER)
    return reference.dense_weight(structure, factors)


def along_features(multiply: Callable[[Tensor], Tensor], x: Tensor, in_features: int, out_features: int) -> Tensor:
    """Apply a function of (n, in_features) to (n, out_features) along the last dimension of x, nested or not."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return _along_nested(multiply, x, in_features, out_features)
        shape = operands.shape_of(x)
        if not shape or shape[-1] != in_features:
            raise RuntimeError(
                f"the input has shape {tuple(shape)}, but its last dimension must be in_features={in_features}"
            )
        if len(shape) == 2:
            return multiply(x)
    elif not isinstance(x, fx.Proxy):
        raise TypeError(f"the input must be a tensor, not {type(x).__name__}")
    y = multiply(x.reshape(-1, in_features))
    # the shape of a proxy cannot be unpacked
    return y.reshape(x.shape[:-1] + (out_features,))  # noqa: RUF005


def _along_nested(multiply: Callable[[Tensor], Tensor], x: Any, in_features: int, out_features: int) -> Tensor:
    if x.layout is not torch.jagged:
        parts = [along_features(multiply, part, in_features, out_features) for part in x.unbind()]
        return torch.nested.as_nested_tensor(parts)
    ragged = x._ragged_idx
    if ragged == x.dim() - 1:
        raise RuntimeError(f"the last dimension of the input must be in_features={in_features}, not its lengths")
    values = along_features(multiply, x.values(), in_features, out_features)
    # with the same offsets, so that torch knows the lengths to be those of x, and can add the two
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths(), jagged_dim=ragged)


def _linear(product: Product, backend: str | None) -> Tensor:
    """Return y of shape (n, out_features), computed as the context of the call demands."""
    if backend is not None:
        check_name(backend)
    if isinstance(product.x, fx.Proxy):
        return reference.apply(product)
    tensors = product.tensors()
    context = call_context(*tensors)
    eager = context is CallContext.EAGER
    plain = context is CallContext.PLAIN
    training = not plain and wants_gradients(*tensors)
    product = autocast(product)
    structure, _, x, _, routing = product
    if plain or (routing is not None and x.is_meta):
        # other backends read the indices, which have no values on "meta"
        backend = "reference"
    elif backend is not None:
        check_support(backend, product)
    elif not eager and torch.compiler.is_compiling():
        sizes = structure.in_features, structure.out_features
        backend = _choose_for_compiler(structure.spec, *sizes, x.dtype, x.device.type, routing is not None)
    else:
        tokens = x.shape[0] if routing is None else max(1, routing.indices.numel() // max(1, product.experts))
        backend = choose(structure, tokens, x.dtype, x.device, training, routing is not None).backend
    if backend == "reference":
        operands.check(*product, memory=eager)
        exports = plain and is_exported() and routing is None
        return exported.apply(product) if exports else reference.apply(product)
    return autograd.run(backend, product, training) if eager else autograd.traced(backend, product)


@assume_constant_result
def _choose_for_compiler(
    spec: str, in_features: int, out_features: int, dtype: torch.dtype, device: str, routed: bool
) -> str:
    """Return the backend that torch.compile traces: a kernel as it is, or operators that it fuses: the reference's."""
    structure = autograd.structure_of(spec, in_features, out_features)
    backend = choose(structure, _MANY_TOKENS, dtype, torch.device(device), training=routed, routed=routed).backend
    fuses = REGISTRY[backend].fusible and not routed and forced().backend is None
    return "reference" if fuses else backend
