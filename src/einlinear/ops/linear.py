"""`linear`: the structured counterpart of `torch.nn.functional.linear`, in eager mode, traced and exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops import autograd, dispatch, executors, reference
from einlinear.ops.constants import assume_constant_result
from einlinear.structures import Structure


def linear(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None = None,
    executor: str | None = None,
) -> Tensor:
    """The structured counterpart of `torch.nn.functional.linear`.

    Args:
        structure: what the matrix is.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`.
        x: (..., in_features), of the same dtype as the factors (or under autocast).
        bias: (out_features,) or None.
        executor: one of `ops.EXECUTORS`, or None: what `explain` says. Under torch.func transforms, torch.export and
            with tensor subclasses such as DTensor it is always the reference, in plain operators.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: x has another number of features or another dtype than the factors, as for
            `torch.nn.functional.linear`; or the executor cannot run this (see `unsupported`).
        ValueError: an unknown executor.
    """
    if x.dim() == 0 or x.shape[-1] != structure.in_features:
        raise RuntimeError(
            f"the input has shape {tuple(x.shape)}, but its last dimension must be in_features={structure.in_features}"
        )
    x, factors, bias = dispatch.of_one_dtype(x, factors, bias)
    tokens = x.reshape(-1, structure.in_features)
    y = _run(structure, factors, tokens, bias, executor)
    return y.reshape(*x.shape[:-1], structure.out_features)


def _run(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, executor: str | None
) -> Tensor:
    """`linear` for x of shape (n, in_features), along the way that suits whoever is looking."""
    way = dispatch.seen(x, bias, *factors)
    if way == "plain":
        return reference.apply(structure, factors, x, bias)
    if executor is None:
        if torch.compiler.is_compiling():
            spec, in_features, out_features = structure.spec, structure.in_features, structure.out_features
            executor = _choose_compiled(spec, in_features, out_features, x.dtype, x.device.type)
        else:
            training = dispatch.wants_gradients(x, bias, *factors)
            executor = dispatch.choose(structure, x.shape[0], x.dtype, x.device, training).executor
    elif (why := executors.unsupported(executor, structure, x.dtype, x.device)) is not None:
        raise RuntimeError(f"the executor {executor!r} cannot run this: {why}")
    if executor == "reference":
        return reference.apply(structure, factors, x, bias)
    if way == "traced":
        op: Tensor = autograd.linear_op(x, list(factors), bias, structure.spec, structure.out_features, executor)
        return op
    return autograd.run(executor, structure, factors, x, bias)


@assume_constant_result
def _choose_compiled(spec: str, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> str:
    """What torch's compiler gets: it fuses the reference itself; our own kernels it takes as they are."""
    structure = autograd.structure_of(spec, in_features, out_features)
    choice = dispatch.choose(structure, dispatch.MANY_TOKENS, dtype, torch.device(device)).executor
    return "reference" if executors.DECLARED[choice].fusible and dispatch.forced.executor is None else choice
