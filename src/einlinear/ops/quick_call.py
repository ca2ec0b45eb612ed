"""The shortest way from a small layer to the compiled kernel, for calls that nothing observes or differentiates.

A layer of 64 features multiplies for less than a microsecond, but the general way takes ten times as long to find out
what a call is, and to choose a backend. Here the choice is kept for a shape, and operands are expected as they usually
are. Whatever is not as usual is left to the general way, which also knows what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from einlinear.ops.context import is_ordinary, wants_gradients
from einlinear.ops.dispatch import choose, remembered
from einlinear.structures import Structure

if TYPE_CHECKING:
    from einlinear.ops.cpu.cpu_backend import Program

# MACs of a call from which the general way takes no noticeable part of the time
LARGE = 10_000_000
_KINDS = {Tensor, nn.Parameter}


class Call(NamedTuple):
    """What calls with inputs of one shape have in common: shapes and bytes of all operands, and the kernel's arguments."""

    operands: tuple[tuple[tuple[int, ...], int], ...]
    result: tuple[int, ...]
    kernel: Callable[..., None]
    program: Program
    tokens: int
    is_parallel: bool


def forward(structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return y of shape (..., out_features), or None if this is not a small, ordinary call of the compiled kernel."""
    if type(x) is not Tensor or not x.is_cpu or x.is_nested or not is_ordinary():
        return None
    call, dtype = _prepare(structure, x.shape, x.dtype, bias is not None), x.dtype
    tensors = (x, *factors) if bias is None else (x, *factors, bias)
    if call is None or len(tensors) != len(call.operands) or (torch.is_grad_enabled() and wants_gradients(*tensors)):
        return None
    try:
        for tensor, (shape, size) in zip(tensors, call.operands):
            if (
                type(tensor) not in _KINDS
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_cpu
                or not tensor.is_contiguous()
                or tensor.is_neg()
                or tensor.untyped_storage().nbytes() < tensor.storage_offset() * tensor.itemsize + size
            ):
                return None
    except (NotImplementedError, RuntimeError):
        # a layout without strides or a storage
        return None
    y = x.new_empty(*call.result)
    at = call.program.pointers(*[factor.data_ptr() for factor in factors])
    threads = torch.get_num_threads() if call.is_parallel else 1
    bias_at = None if bias is None else bias.data_ptr()
    call.kernel(call.program.address, at, x.data_ptr(), bias_at, y.data_ptr(), None, None, call.tokens, threads)
    return y


@remembered
def _prepare(structure: Structure, shape: torch.Size, dtype: torch.dtype, has_bias: bool) -> Call | None:
    if not shape or shape[-1] != structure.in_features:
        return None
    tokens, device = shape[:-1].numel(), torch.device("cpu")
    if not 0 < tokens * structure.macs < LARGE or choose(structure, tokens, dtype, device).backend != "cpu":
        return None
    # when it is needed, since it takes time to import
    from einlinear.ops.cpu import cpu_backend

    library, program = cpu_backend.load(dtype), cpu_backend.program_of(structure)
    assert not isinstance(library, str), "or it could not be chosen"
    result = (*shape[:-1], structure.out_features)
    shapes = (shape, *structure.shapes) if not has_bias else (shape, *structure.shapes, (structure.out_features,))
    operands = tuple((tuple(shape), math.prod(shape) * dtype.itemsize) for shape in shapes)
    is_parallel = tokens * structure.macs > cpu_backend.PARALLEL_MACS
    return Call(operands, result, library.forward, program, tokens, is_parallel)
