"""The operands of a product: one check that they fit, before anything computes with them.

Compiled kernels get pointers and plain einsum broadcasts: neither would notice a wrong shape, dtype or device, or
memory that was released. `backends.Backend` puts the check before every backend, `functional.py` before the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from einlinear.ops.product import Assignment
from einlinear.structures import Factor, Structure

# name (or factor), tensor, and the shape that it must have
Operand = tuple[str | Factor, Any, tuple[int, ...]]
# the only operand of any dtype: a backend may compute in another one than it reads
_SAVED = "a saved intermediate"


def check(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor | None = None,
    bias: Tensor | None = None,
    routing: Assignment | None = None,
    *,
    grad: Tensor | None = None,
    saved: Sequence[Tensor] = (),
    memory: bool = True,
) -> bool:
    """Raise unless the operands of a product, forward or backward, fit the structure and one another.

    Without x, the factors alone are checked. `memory` is False where something traces or transforms the tensors. The
    result says whether torch has put off the negation of an operand, so that its memory holds other values.
    """
    if not memory and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        with _untraced():
            return check(structure, factors, x, bias, routing, grad=grad, saved=saved, memory=memory)
    expected = structure.factors
    if len(factors) != len(expected):
        raise ValueError(f"{structure} has {len(expected)} factors, not {len(factors)}")
    stack = () if routing is None else factors[0].shape[:1]
    operands: list[Operand] = [(factor, tensor, stack + factor.shape) for factor, tensor in zip(expected, factors)]
    if x is not None:
        n = x.shape[0] if x.dim() else 0
        operands.append(("the input", x, (n, structure.in_features)))
        if grad is not None:
            operands.append(("the gradient of the output", grad, (n, structure.out_features)))
        if routing is not None:
            operands.append(("the tensor of gates", routing[1], _check_indices(x, *routing, memory)))
    if bias is not None:
        operands.append(("the bias", bias, (structure.out_features,)))
    operands += [(_SAVED, tensor, tensor.shape) for tensor in saved]
    negated = False
    try:
        _, first, _ = operands[0]
        dtype, device = first.dtype, first.device
        for name, tensor, shape in operands:
            if tensor.shape != shape or tensor.device != device or (tensor.dtype is not dtype and name != _SAVED):
                break
            if memory:
                # `_in_memory` for contiguous tensors, without the cost of its call
                if tensor.is_contiguous():
                    if tensor.untyped_storage().nbytes() < tensor.storage_offset() * tensor.itemsize + tensor.nbytes:
                        break
                elif not _in_memory(tensor):
                    break
                negated = negated or tensor.is_neg()
        else:
            if routing is not None and memory:
                _check_range(routing[0], len(factors[0]))
            return negated
    except (AttributeError, NotImplementedError, RuntimeError):
        # of something that is not a tensor, or has no strides, or no storage
        _refuse(structure, operands, memory)
        raise
    _refuse(structure, operands, memory)
    return negated


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError, with this name of the tensor, if the memory of a strided tensor was released."""
    if tensor.layout is torch.strided and type(tensor) in (Tensor, torch.nn.Parameter):
        _check_memory(name, tensor)


def _check_memory(name: str, tensor: Tensor) -> None:
    if not _in_memory(tensor):
        raise RuntimeError(
            f"the memory of {name} is smaller than its shape. Something has released it, as FSDP does with parameters "
            "while their module is not running"
        )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as numbers, also while torch.jit traces, which makes tensors of them."""
    shape = tensor.shape
    if shape and isinstance(shape[-1], Tensor):
        with _untraced():
            shape = tensor.shape
    return shape


@contextmanager
def _untraced() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _in_memory(tensor: Tensor) -> bool:
    """Return whether the storage reaches as far as the tensor does."""
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())])
    extent = tensor.itemsize * (1 + last) if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= tensor.storage_offset() * tensor.itemsize + extent


def _check_indices(x: Tensor, indices: Tensor, gates: Tensor, memory: bool) -> tuple[int, ...]:
    """Check the indices of the experts, and return their shape, which is that of the gates."""
    _check_type("the tensor of indices", indices)
    _check_type("the tensor of gates", gates)
    if indices.dim() != 2 or indices.shape != gates.shape or indices.shape[:1] != x.shape[:1] or not indices.shape[1]:
        raise RuntimeError(
            f"indices of shape {tuple(indices.shape)} and gates of shape {tuple(gates.shape)}: "
            f"both must be ({len(x)}, active), with an active expert or more"
        )
    if indices.dtype != torch.int64:
        raise RuntimeError(f"the indices are of {indices.dtype}, but must be of torch.int64")
    if indices.device != x.device:
        raise RuntimeError(f"the indices are on {indices.device}, but the input on {x.device}: move one of them")
    if memory:
        _check_memory("the tensor of indices", indices)
    return indices.shape


def _check_range(indices: Tensor, experts: int) -> None:
    if indices.is_cpu and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= experts:
            raise IndexError(f"expert {low if low < 0 else high}: there are {experts}, from 0 to {experts - 1}")


def _check_type(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def _refuse(structure: Structure, operands: Sequence[Operand], memory: bool) -> None:
    """Raise an error for the operand that does not fit, with its name and what would fit."""
    named = [(key if isinstance(key, str) else f"factor {key.name}", *others) for key, *others in operands]
    for name, tensor, shape in named:
        _check_type(name, tensor)
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"{name} has the layout {tensor.layout}, but must be strided: see `Tensor.to_dense`")
        if tensor.shape != shape:
            label = {
                "the input": "in_features=",
                "the bias": "out_features=",
                "the gradient of the output": "out_features=",
            }
            text = ", ".join([*map(str, shape[:-1]), f"{label.get(name, '')}{shape[-1]}"])
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, but {structure} needs ({text})")
    first, reference, _ = named[0]
    for name, tensor, _ in named:
        other = "the layer" if name == "the input" else first
        if tensor.dtype != reference.dtype and name != _SAVED:
            raise RuntimeError(f"{name} is of {tensor.dtype}, but {other} of {reference.dtype}: convert one of them")
        if tensor.device != reference.device:
            advice = "move one of them"
            if "meta" in (tensor.device.type, reference.device.type):
                advice = "a tensor on meta has no values yet, so load it, or initialise it after `to_empty`"
            raise RuntimeError(f"{name} is on {tensor.device}, but {other} on {reference.device}: {advice}")
    for name, tensor, _ in named:
        if memory:
            _check_memory(name, tensor)
