"""The fast path from a small layer to the compiled kernel, for calls that nothing observes or transforms.

A layer of 64 features multiplies for less than a microsecond, but the general way takes ten times as long to find out
what a call is, and to choose a backend. Here the choice is kept for a shape, and operands are expected as they usually
are. Whatever is not as usual is left to the general way, which also knows what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from einlinear.ops.context import is_ordinary
from einlinear.ops.dispatch import cached, choose, recomputes
from einlinear.ops.operands import Extent, are_contiguous_cpu, extents, weight_shapes
from einlinear.structures import Structure

if TYPE_CHECKING:
    from einlinear.ops.cpu.cpu_backend import Program
    from einlinear.ops.cpu.kernel_library import Library

# the addresses of x and the factors, and the latter as an array for the kernel
Pointers = tuple[list[int], Any]
# MACs of a call from which the general way takes no noticeable part of the time
LARGE = 10_000_000
# MACs of a call up to which intermediates are computed again sooner than memory for them is found
RECOMPUTED = 1_000_000


class Call(NamedTuple):
    """What calls with inputs of one shape have in common: the extents of operands, the kernel's arguments."""

    # of x, the factors and the bias
    inputs: tuple[Extent, ...]
    result: Extent
    library: Library
    program: Program
    tokens: int
    is_parallel: bool


def find(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, training: bool
) -> Call | None:
    """Return the call, or None if it is not a small, ordinary one of the compiled kernel, or an operand is unusual."""
    if not x.is_cpu or x.is_nested or not is_ordinary():
        return None
    call = _prepare(structure, x.shape, x.dtype, bias is not None, training)
    tensors = (x, *factors) if bias is None else (x, *factors, bias)
    if call is None or len(tensors) != len(call.inputs) or not are_contiguous_cpu(tensors, call.inputs, x.dtype):
        return None
    return call


def forward(call: Call, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> tuple[Tensor, Pointers]:
    """Return y of shape (..., out_features), and where x and the factors lie, for `backward`."""
    y, x_at, at = x.new_empty(*call.result[0]), x.data_ptr(), [factor.data_ptr() for factor in factors]
    factors_at, bias_at = call.program.pointers(*at), None if bias is None else bias.data_ptr()
    threads = torch.get_num_threads() if call.is_parallel else 1
    call.library.forward(
        call.program.address, factors_at, x_at, bias_at, y.data_ptr(), None, None, call.tokens, threads
    )
    return y, ([x_at, *at], factors_at)


def backward(
    call: Call, pointers: Pointers, inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None] | None:
    """Return the gradients of x, the bias and the factors that are needed, given that of y.

    The result is None if something is not as it was, or usually is.
    """
    at, factors_at = pointers
    x, _, *factors = inputs
    if torch.is_grad_enabled() or not is_ordinary() or [x.data_ptr(), *[f.data_ptr() for f in factors]] != at:
        return None
    if not are_contiguous_cpu((grad,), (call.result,), x.dtype):
        return None
    needs_x, needs_bias, *needs_factors = needed
    shapes = call.inputs
    grad_x = x.new_empty(*shapes[0][0]) if needs_x else None
    grads = [x.new_empty(*shapes[i][0]) if needs else None for i, needs in enumerate(needs_factors, 1)]
    grads_at = call.program.pointers(*[None if g is None else g.data_ptr() for g in grads])
    ends = at[0], grad.data_ptr(), None, None if grad_x is None else grad_x.data_ptr(), None
    threads = torch.get_num_threads() if call.is_parallel else 1
    call.library.backward(call.program.address, factors_at, grads_at, *ends, None, call.tokens, threads)
    return [grad_x, grad.sum(0) if needs_bias else None, *grads]


@cached
def _prepare(
    structure: Structure, shape: torch.Size, dtype: torch.dtype, has_bias: bool, training: bool
) -> Call | None:
    if not shape or shape[-1] != structure.in_features:
        return None
    tokens, device = shape[:-1].numel(), torch.device("cpu")
    macs = tokens * structure.macs
    if not 0 < macs < LARGE or choose(structure, tokens, dtype, device, training).backend != "cpu":
        return None
    if training and (len(shape) != 2 or (macs > RECOMPUTED and not recomputes("cpu", structure))):
        return None
    # when it is needed, since it takes time to import
    from einlinear.ops.cpu import cpu_backend, kernel_library

    library, program = kernel_library.load(dtype), cpu_backend.program_of(structure)
    assert not isinstance(library, str), "or it could not be chosen"
    result = *shape[:-1], structure.out_features
    *inputs, output = extents((shape, *weight_shapes(structure, has_bias), result), dtype.itemsize)
    return Call(tuple(inputs), output, library, program, tokens, macs > cpu_backend.PARALLEL_MACS)
