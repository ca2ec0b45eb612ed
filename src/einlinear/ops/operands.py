"""The operands of a product, and one check that they fit, before anything computes with them.

Neither compiled kernels, which get pointers, nor plain einsum, which broadcasts, would notice a wrong shape or dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from einlinear.structures import Structure

# the only operand of any shape and dtype: a backend may compute in another one than it reads
_SAVED = "a saved intermediate"
# the shape and the bytes of a tensor
Extent = tuple[tuple[int, ...], int]
_PLAIN_TYPES = {Tensor, nn.Parameter}


class Weights(NamedTuple):
    """The weights of one layer, as `linear` takes them.

    Attributes:
        structure: of the matrix.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`.
        bias: (out_features,) or None.
    """

    structure: Structure
    factors: Sequence[Tensor]
    bias: Tensor | None = None


class Routing(NamedTuple):
    """Routing of tokens to experts: the experts of every token, and gates that scale their inputs.

    Attributes:
        indices: (n, active), int64, the experts of every token, in any order and of any load.
        gates: (n, active), their weights.
    """

    indices: Tensor
    gates: Tensor


class Operands(NamedTuple):
    """The operands of y = x Wᵀ + bias; with a routing, of y = bias + sum of gate_e * W_e x over the experts e."""

    # of the matrix, or of every expert's
    structure: Structure
    # in the order and of the shapes of `structure.factors`; with a routing, stacks of these: (experts, *shape)
    factors: Sequence[Tensor]
    # (n, in_features) and (out_features,)
    x: Tensor
    bias: Tensor | None = None
    routing: Routing | None = None

    @property
    def experts(self) -> int:
        """The number of stacked matrices; 0 without factors."""
        return len(self.factors[0]) if self.factors else 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return x, the bias, the factors and the routing's indices and gates."""
        _, factors, x, bias, routing = self
        return (x, bias, *factors) if routing is None else (x, bias, *factors, *routing)

    @staticmethod
    def of(structure: Structure, x: Tensor, bias: Tensor | None, *others: Tensor) -> Operands:
        """Return the operands, given their tensors in the order of `tensors`."""
        count = len(structure.factors)
        routing = Routing(*others[count:]) if len(others) > count else None
        return Operands(structure, others[:count], x, bias, routing)

    def resolve_neg(self) -> Operands:
        """Return the operands, with those whose negation torch has put off (`Tensor.is_neg`) negated in memory."""
        return Operands.of(self.structure, *[t if t is None else t.resolve_neg() for t in self.tensors()])  # type: ignore[arg-type]

    def check(self, grad: Tensor | None = None, saved: Sequence[Tensor] = (), memory: bool = True) -> bool:
        """Raise unless the operands, forward or backward, fit the structure and one another.

        Where x is None, the factors alone are checked. `memory` is False where something traces or transforms the
        tensors. The result says whether torch has put off the negation of an operand, so that its memory holds other
        values.
        """
        if not memory and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            with _untraced():
                return self.check(grad, saved, memory)
        structure, factors, x, bias, routing = self
        if len(factors) != len(structure.shapes):
            raise ValueError(f"{structure} has {len(structure.shapes)} factors, not {len(factors)}")
        # in the order of `_names`, which are only looked for if something does not fit: small layers feel every
        # microsecond
        tensors, shapes = [*factors], [*structure.shapes]
        if routing is not None:
            stack = factors[0].shape[:1]
            shapes = [stack + shape for shape in shapes]
        if x is not None:
            n = x.shape[0] if x.dim() else 0
            tensors.append(x)
            shapes.append((n, structure.in_features))
            if grad is not None:
                tensors.append(grad)
                shapes.append((n, structure.out_features))
            if routing is not None:
                tensors.append(routing[1])
                shapes.append(_check_indices(x, *routing, memory))
        if bias is not None:
            tensors.append(bias)
            shapes.append((structure.out_features,))
        checked = len(tensors)
        if saved:
            tensors += saved
            shapes += [tensor.shape for tensor in saved]
        negated = False
        try:
            dtype, device = tensors[0].dtype, tensors[0].device
            for i, tensor in enumerate(tensors):
                if tensor.shape != shapes[i] or tensor.device != device or (tensor.dtype is not dtype and i < checked):
                    break
                if memory:
                    # `_in_memory` for contiguous tensors, without the cost of its call
                    if tensor.is_contiguous():
                        end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
                        if tensor.untyped_storage().nbytes() < end:
                            break
                    elif not _in_memory(tensor):
                        break
                    if tensor.is_neg():
                        negated = True
            else:
                if routing is not None and memory:
                    _check_range(routing[0], len(factors[0]))
                return negated
        except (AttributeError, NotImplementedError, RuntimeError):
            # of something that is not a tensor, or has no strides, or no storage
            _refuse(structure, [*zip(_names(self, grad, saved), tensors, shapes)], memory)
            raise
        _refuse(structure, [*zip(_names(self, grad, saved), tensors, shapes)], memory)
        return negated


class Gradients(NamedTuple):
    """The gradients of operands, None where they are not needed: of x, of the gates, and of every factor."""

    x: Tensor | None
    gates: Tensor | None
    factors: list[Tensor | None]


def _names(operands: Operands, grad: Tensor | None, saved: Sequence[Tensor]) -> list[str]:
    names = [f"factor {factor.name}" for factor in operands.structure.factors]
    if operands.x is not None:
        names += ["the input"] + ["the gradient of the output"] * (grad is not None)
        names += ["the tensor of gates"] * (operands.routing is not None)
    return names + ["the bias"] * (operands.bias is not None) + [_SAVED] * len(saved)


def extents(shapes: Sequence[Sequence[int]], itemsize: int) -> tuple[Extent, ...]:
    """Return the shape and the bytes of each contiguous tensor, for `are_contiguous_cpu`."""
    return tuple([(tuple(shape), math.prod(shape) * itemsize) for shape in shapes])


def weight_shapes(structure: Structure, has_bias: bool) -> list[tuple[int, ...]]:
    """Return the shapes of the factors, and of the bias if there is one."""
    return [*structure.shapes, *[(structure.out_features,)] * has_bias]


def are_contiguous_cpu(tensors: Sequence[Tensor], extents: Sequence[Extent], dtype: torch.dtype) -> bool:
    """Return whether tensors are contiguous on the CPU, plain, and of these extents: they need no further check."""
    try:
        for tensor, (shape, size) in zip(tensors, extents):
            if (
                tensor.shape != shape
                or tensor.dtype is not dtype
                or type(tensor) not in _PLAIN_TYPES
                or not tensor.is_cpu
                or not tensor.is_contiguous()
                or tensor.is_neg()
                or tensor.untyped_storage().nbytes() < tensor.storage_offset() * tensor.itemsize + size
            ):
                return False
    except (AttributeError, NotImplementedError, RuntimeError):
        # of something that is not a tensor, or has no strides, or no storage
        return False
    return True


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError, with this name of the tensor, if the memory of a strided tensor was released."""
    is_plain = tensor.layout is torch.strided and type(tensor) in _PLAIN_TYPES
    if is_plain and not _in_memory(tensor):
        advice = "FSDP releases that of parameters while their module is not running"
        raise RuntimeError(f"the memory of {name} is smaller than its shape, because something released it: {advice}")


def along_features(multiply: Callable[[Tensor], Tensor], x: Tensor, in_features: int, out_features: int) -> Tensor:
    """Apply a function of (n, in_features) to (n, out_features) along the last dimension of x, nested or not."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return _along_nested(multiply, x, in_features, out_features)
        shape = shape_of(x)
        if not shape or shape[-1] != in_features:
            needed = f"its last dimension must be in_features={in_features}"
            raise RuntimeError(f"the input has shape {tuple(shape)}, but {needed}")
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
        shapes = f"indices of shape {tuple(indices.shape)} and gates of shape {tuple(gates.shape)}"
        raise RuntimeError(f"{shapes}: both must be ({len(x)}, active), with an active expert or more")
    if indices.dtype != torch.int64:
        raise RuntimeError(f"the indices are of {indices.dtype}, but must be of torch.int64")
    if indices.device != x.device:
        raise RuntimeError(f"the indices are on {indices.device}, but the input on {x.device}: move one of them")
    if memory:
        check_memory("the tensor of indices", indices)
    return indices.shape


def _check_range(indices: Tensor, experts: int) -> None:
    if indices.is_cpu and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= experts:
            raise IndexError(f"expert {low if low < 0 else high}: there are {experts}, from 0 to {experts - 1}")


def _check_type(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def _refuse(structure: Structure, named: Sequence[tuple[str, Any, tuple[int, ...]]], memory: bool) -> None:
    """Raise an error for the operand that does not fit, by its name, with the shape that would fit."""
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
            check_memory(name, tensor)
