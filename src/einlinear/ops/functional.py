"""`linear`: the structured counterpart of `torch.nn.functional.linear`, in eager mode, traced and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from einlinear.ops import autograd, backends, dispatch, operands, reference
from einlinear.ops.constants import assume_constant_result
from einlinear.structures import Structure


def linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The structured counterpart of `torch.nn.functional.linear`.

    Args:
        structure: what the matrix is.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`.
        x: (..., in_features), of the same dtype as the factors (or under autocast); nested tensors included.
        bias: (out_features,) or None.
        backend: one of `ops.BACKENDS`, or None: what `explain` says. While torch.jit, torch.fx or torch.export
            traces, under torch.func transforms and forward-mode differentiation, and with tensor subclasses such as
            DTensor it is always the reference, in plain operators.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: x has another number of features than the structure; a factor or the bias has another shape;
            dtypes or devices differ; the memory of a tensor was released; or the backend cannot run this (see
            `unsupported`).
        ValueError: an unknown backend; more or fewer factors than the structure has.
        TypeError: something else than a tensor.
    """

    def multiply(tokens: Tensor) -> Tensor:
        return _linear(structure, factors, tokens, bias, backend)

    return along_features(multiply, x, structure.in_features, structure.out_features)


def dense_weight(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """W of shape (out_features, in_features): the weights of all terms, added up; differentiable.

    Raises:
        RuntimeError, ValueError, TypeError: factors that do not fit the structure, as for `linear`.
    """
    if not any(isinstance(factor, fx.Proxy) for factor in factors):  # of which torch.fx knows nothing
        operands.check(structure, factors, memory=dispatch.seen(*factors) == "eager")
    return reference.dense_weight(structure, factors)


def along_features(multiply: Callable[[Tensor], Tensor], x: Tensor, in_features: int, out_features: int) -> Tensor:
    """Apply a function of (n, in_features) to (n, out_features) along the last dimension of x.

    Args:
        multiply: the function.
        x: (..., in_features), with any leading dimensions; or a nested tensor, and then the result is one as well.
        in_features, out_features: the sizes of the last dimension.

    Raises:
        TypeError: x is not a tensor.
        RuntimeError: x has another number of features.
    """
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


def _linear(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, backend: str | None
) -> Tensor:
    """`linear` for x of shape (n, in_features), along the way that suits whoever is looking."""
    way = dispatch.seen(x, bias, *factors)
    if backend is not None:
        backends.check_name(backend)
    if isinstance(x, fx.Proxy):
        return reference.apply(structure, factors, x, bias)
    x, factors, bias = dispatch.of_one_dtype(x, factors, bias)
    if way == "plain":
        backend = "reference"
    elif backend is not None:
        backends.check_support(backend, structure, x.dtype, x.device)
    elif torch.compiler.is_compiling():
        spec, in_features, out_features = structure.spec, structure.in_features, structure.out_features
        backend = _choose_compiled(spec, in_features, out_features, x.dtype, x.device.type)
    else:
        training = dispatch.wants_gradients(x, bias, *factors)
        backend = dispatch.choose(structure, x.shape[0], x.dtype, x.device, training).backend
    if backend == "reference":
        operands.check(structure, factors, x, bias, memory=way == "eager")
        return reference.apply(structure, factors, x, bias)
    if way == "traced":
        op: Tensor = autograd.linear_op(x, list(factors), bias, structure.spec, structure.out_features, backend)
        return op
    return autograd.run(backend, structure, factors, x, bias)


@assume_constant_result
def _choose_compiled(spec: str, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> str:
    """What torch's compiler gets: it fuses the reference itself; our own kernels it takes as they are."""
    structure = autograd.structure_of(spec, in_features, out_features)
    choice = dispatch.choose(structure, dispatch.MANY_TOKENS, dtype, torch.device(device)).backend
    return "reference" if backends.DECLARED[choice].fusible and dispatch.forced().backend is None else choice
