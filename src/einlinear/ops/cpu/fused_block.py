"""Feed-forward blocks in the compiled kernel: a tile of tokens passes through all layers while it is in cache.

Hidden features are never in memory. The backward pass computes them again from x.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.activation_functions import ACTIVATIONS
from einlinear.ops.cpu import cpu_backend
from einlinear.ops.cpu.cpu_backend import library_for, program_of
from einlinear.ops.feed_forward_structure import FeedForwardStructure

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
# keeps the array alive that it points to
_Addresses = ctypes.POINTER(ctypes.c_void_p)


class LayerArguments(ctypes.Structure):
    """A layer, as `LayerArguments` in feed_forward.h says."""

    _fields_ = (("program", ctypes.c_void_p), ("factors", _Addresses), ("bias", ctypes.c_void_p))


class BlockArguments(ctypes.Structure):
    """A block, as `BlockArguments` in feed_forward.h says; the pointers of a gate that is missing are null."""

    _fields_ = (
        *((name, LayerArguments) for name in ("up", "gate", "down")),
        *((name, ctypes.c_int64) for name in ("activation", "residual")),
    )


class LayerGradients(ctypes.Structure):
    """Gradients of a layer, as `LayerGradients` in feed_forward.h says; null where they are not needed."""

    _fields_ = (("factors", _Addresses), ("bias", ctypes.c_void_p))


class BlockGradients(ctypes.Structure):
    """Gradients of a block, as `BlockGradients` in feed_forward.h says."""

    _fields_ = tuple((name, LayerGradients) for name in ("up", "gate", "down"))


def forward(block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return y of shape (n, out_features)."""
    x, tensors, n = x.contiguous(), [tensor.contiguous() for tensor in tensors], x.shape[0]
    y = x.new_empty(n, block.features[-1])
    if n:
        pointers = ctypes.byref(_arguments(block, tensors))
        library_for(x).feed_forward(pointers, x.data_ptr(), y.data_ptr(), n, _threads(block, n))
    return y


def backward(
    block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients that are needed, of x and of the tensors, given that of y."""
    x, grad, tensors, n = x.contiguous(), grad.contiguous(), [tensor.contiguous() for tensor in tensors], x.shape[0]
    new = torch.empty_like if n else torch.zeros_like
    gradients = [new(tensor) if needs else None for tensor, needs in zip((x, *tensors), needed, strict=True)]
    if n:
        pointers = ctypes.byref(_arguments(block, tensors)), ctypes.byref(_gradients(block, gradients[1:]))
        ends = x.data_ptr(), grad.data_ptr(), _address(gradients[0])
        library_for(x).feed_forward_backward(*pointers, *ends, n, _threads(block, n))
    return gradients


def _arguments(block: FeedForwardStructure, tensors: Sequence[Tensor]) -> BlockArguments:
    layers = {}
    for name, structure, (factors, bias) in zip(block.names, block.structures, block.split(tensors)):
        program = program_of(structure)
        layers[name] = LayerArguments(program.address, program.pointers(*map(_address, factors)), _address(bias))
    return BlockArguments(**layers, activation=_NUMBERS[block.activation], residual=block.residual)


def _gradients(block: FeedForwardStructure, gradients: Sequence[Tensor | None]) -> BlockGradients:
    layers = {}
    for name, structure, (factors, bias) in zip(block.names, block.structures, block.split(gradients)):
        layers[name] = LayerGradients(program_of(structure).pointers(*map(_address, factors)), _address(bias))
    return BlockGradients(**layers)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(block: FeedForwardStructure, n: int) -> int:
    return torch.get_num_threads() if block.macs * n > cpu_backend.PARALLEL_MACS else 1
