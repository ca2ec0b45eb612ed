"""The path from a quantized layer to the compiled kernel, which expands quantised factors a piece at a time, in cache.

Calls that something observes or transforms, or that need gradients, are left to expanded factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from einlinear.ops.backends import reason_unsupported
from einlinear.ops.context import forced, is_unobserved, wants_gradients
from einlinear.ops.dispatch import cached, choose
from einlinear.ops.integer_format import IntegerFormat
from einlinear.ops.operands import Extent, are_contiguous_cpu, extents
from einlinear.structures import Structure

if TYPE_CHECKING:
    from einlinear.ops.cpu.cpu_backend import Program
    from einlinear.ops.cpu.kernel_library import Library

# for each factor, or None for numbers of bfloat16
Formats = tuple[IntegerFormat | None, ...]
# microseconds for each parameter that the expansion of factors in memory takes at least
EXPANSION = 1.5e-3
# bits of a number of bfloat16
_HALF = 16


class QuantizedCall(NamedTuple):
    """What calls with inputs of one shape have in common: the extents of operands, the kernel's arguments."""

    # of x and the bias
    inputs: tuple[Extent, ...]
    # of codes and scales, and their dtypes
    quantized: tuple[tuple[Extent, torch.dtype], ...]
    result: tuple[int, ...]
    # of every factor, the fields of `QuantizedFactor` without its pointers
    fields: tuple[tuple[int, int, int, int], ...]
    library: Library
    program: Program
    tokens: int
    is_parallel: bool


def find(
    structure: Structure, formats: Formats, quantized: Sequence[Tensor], x: Tensor, bias: Tensor | None
) -> QuantizedCall | str:
    """Return the call, or why the factors are expanded first.

    Args:
        structure, formats: of the matrix, and of its factors.
        quantized: codes and scales of every factor, as `IntegerFormat.pack` and `scales` of shape (batch, new, groups),
            or the bits of its numbers of bfloat16 in int16.
        x, bias: as for `linear`.
    """
    if not is_unobserved():
        return "something traces, transforms or casts the call"
    if not x.is_cpu or x.is_nested:
        return "the compiled kernel runs on the CPU, with plain tensors"
    if wants_gradients(x, bias):
        return "a backward pass may follow"
    call = _prepare(structure, formats, x.shape, x.dtype, bias is not None, forced().backend)
    if isinstance(call, str):
        return call
    is_usual = (
        len(quantized) == len(call.quantized)
        and are_contiguous_cpu((x,) if bias is None else (x, bias), call.inputs, x.dtype)
        and all([are_contiguous_cpu((t,), (extent,), dtype) for t, (extent, dtype) in zip(quantized, call.quantized)])
    )
    return call if is_usual else "an operand is not contiguous, or does not fit the layer"


def forward(call: QuantizedCall, quantized: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Return y of shape (..., out_features)."""
    y, at = x.new_empty(*call.result), iter([tensor.data_ptr() for tensor in quantized])
    # numbers of bfloat16 have no scales
    factors = [(next(at), None if fields[0] == _HALF else next(at), *fields) for fields in call.fields]
    threads = torch.get_num_threads() if call.is_parallel else 1
    call.library.forward_quantized(
        call.program.address,
        call.program.quantized(*factors),  # type: ignore[misc]
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        call.tokens,
        threads,
    )
    return y


def _backend(structure: Structure, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return the backend that is the cheapest, if all others need expanded factors."""
    choice = choose(structure, tokens, dtype, device)
    times = dict(choice.estimates)
    is_slower = times and times["cpu"] > times[choice.backend] + EXPANSION * structure.params
    return choice.backend if is_slower else "cpu"


@cached
def _prepare(
    structure: Structure, formats: Formats, shape: torch.Size, dtype: torch.dtype, has_bias: bool, forced: str | None
) -> QuantizedCall | str:
    if not shape or shape[-1] != structure.in_features or not shape.numel():
        return "the input is empty or does not fit the layer"
    tokens, device = shape[:-1].numel(), torch.device("cpu")
    if (why := reason_unsupported("cpu", structure, dtype, device)) is not None:
        return why
    backend = forced or _backend(structure, tokens, dtype, device)
    if backend != "cpu":
        return f"the backend {backend!r} multiplies with expanded factors"
    # when it is needed, since it takes time to import
    from einlinear.ops.cpu import cpu_backend, kernel_library

    fields, quantized = [], []
    for factor, format in zip(structure.factors, formats, strict=True):
        if format is None:
            fields.append((_HALF, 0, 0, 0))
            quantized.append((factor.shape, torch.int16))
            continue
        columns, batch_new = factor.fan_in, (factor.params // factor.fan_in // factor.fan_out, factor.fan_out)
        groups, row_bytes = format.groups(columns), format.code_bytes(columns)
        fields.append((format.bits, format.group or columns, groups, row_bytes))
        quantized += [((*batch_new, row_bytes), torch.uint8), ((*batch_new, groups), torch.int16)]
    library = kernel_library.load(dtype)
    assert not isinstance(library, str), "or it could not run"
    program = cpu_backend.program_of(structure, frozenset(i for i, format in enumerate(formats) if format))
    biases = [(structure.out_features,)] * has_bias
    return QuantizedCall(
        extents((shape, *biases), dtype.itemsize),
        tuple([(extents((shape,), dtype.itemsize)[0], dtype) for shape, dtype in quantized]),
        (*shape[:-1], structure.out_features),
        tuple(fields),
        library,
        program,
        tokens,
        tokens * structure.macs > cpu_backend.PARALLEL_MACS,
    )
