"""The compiled CPU backend. The kernel knows no structure: it reads a program, numbers arranged as program.h says."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from einlinear.ops.cpu.kernel_library import DTYPES, Library, Pairs, QuantizedFactor, load
from einlinear.ops.operands import Gradients, Operands, Routing
from einlinear.structures import Structure
from einlinear.structures.pattern import Axes

# MACs of a call above which several threads share it: starting them takes about as long as 100,000 MACs
PARALLEL_MACS = 300_000


def reason_unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this backend cannot run, or None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes in real numbers of 16, 32 or 64 bits, not in {str(dtype).removeprefix('torch.')}"
    library = load(dtype)
    return library if isinstance(library, str) else None


def forward(operands: Operands, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates if they are to be saved."""
    structure, factors, x, bias, routing = operands
    program, n = program_of(structure), x.shape[0]
    x, factors = x.contiguous(), [factor.contiguous() for factor in factors]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, structure.out_features)
    saved = []
    if save and program.intermediate_size and routing is None:
        tile: int = library_for(x).tile(program.address, n)
        # half precision exists in memory only: what is between two factors is float32
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        saved = [x.new_empty(-(-n // tile) * tile * program.intermediate_size, dtype=dtype)]
    if n:
        pairs, threads, _kept_alive = _schedule(program, factors, routing, n)
        # written out: this is most of the overhead of a call
        at = program.pointers(*[factor.data_ptr() for factor in factors])
        bias_at, saved_at = None if bias is None else bias.data_ptr(), saved[0].data_ptr() if saved else None
        library_for(x).forward(program.address, at, x.data_ptr(), bias_at, y.data_ptr(), saved_at, pairs, n, threads)
    return y, saved


def backward(
    operands: Operands, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    structure, factors, x, _, routing = operands
    program, n = program_of(structure), x.shape[0]
    x, grad, factors = x.contiguous(), grad.contiguous(), [factor.contiguous() for factor in factors]
    saved = [tensor.contiguous() for tensor in saved]
    new = torch.empty_like if n else torch.zeros_like
    grad_x = new(x) if needs_x else None
    grad_gates = new(routing.gates.contiguous()) if needs_x and routing is not None else None
    grad_factors = [new(factor) if needed else None for factor, needed in zip(factors, needs_factors, strict=True)]
    if n:
        pairs, threads, _kept_alive = _schedule(program, factors, routing, n)
        # written out, as in `forward`
        at = program.pointers(*[factor.data_ptr() for factor in factors])
        grads_at = program.pointers(*[None if grad is None else grad.data_ptr() for grad in grad_factors])
        saved_at, grad_x_at = saved[0].data_ptr() if saved else None, None if grad_x is None else grad_x.data_ptr()
        gates_at = None if grad_gates is None else grad_gates.data_ptr()
        ends = x.data_ptr(), grad.data_ptr(), saved_at, grad_x_at, gates_at
        library_for(x).backward(program.address, at, grads_at, *ends, pairs, n, threads)
    return Gradients(grad_x, grad_gates, grad_factors)


def _schedule(
    program: Program, factors: Sequence[Tensor], routing: Routing | None, n: int
) -> tuple[object, int, tuple[Tensor, ...]]:
    """Return the sorted pairs of a routing for the kernel, the number of threads, and the tensors behind the pairs."""
    if routing is None:
        return None, torch.get_num_threads() if program.macs * n > PARALLEL_MACS else 1, ()
    indices, gates = routing.indices, routing.gates.contiguous()
    threads = torch.get_num_threads() if program.macs * indices.numel() > PARALLEL_MACS else 1
    active, experts = indices.shape[1], len(factors[0])
    # 128 pairs for each expert: fewer leave tiles half empty, more do not stay in cache; but every thread needs a block
    block = max(1, min(-(-n // threads), -(-128 * experts // active)))
    keys = indices
    if block < n:
        keys = indices + (torch.arange(n, device=indices.device) // block * experts)[:, None]
    # where the pairs of every (block, expert) begin
    cells = -(-n // block) * experts
    first = indices.new_zeros(cells + 1)
    torch.cumsum(torch.bincount(keys.flatten(), minlength=cells), 0, out=first[1:])
    tensors = first, keys.flatten().argsort(stable=True), gates
    return ctypes.byref(Pairs(*[tensor.data_ptr() for tensor in tensors], n, block, experts, active)), threads, tensors


def library_for(x: Tensor) -> Library:
    """Return the kernels for the dtype of a tensor, which must be on the CPU."""
    library = load(x.dtype)
    assert isinstance(library, Library), "the dispatcher asks `reason_unsupported` first"
    if not x.is_cpu:
        raise RuntimeError(f"the compiled kernel runs on the CPU, not on {x.device.type}")
    return library


class Program:
    """A structure as the kernel reads it: for every step the sizes of its products, and tables of where rows lie.

    Factors with an index in `matrices` lie in memory as `as_matrices` returns them, the others as they are.
    """

    def __init__(self, structure: Structure, matrices: frozenset[int] = frozenset()) -> None:
        self.macs, self._sizes = structure.macs, dict(structure.sizes)
        # the types of arrays with a pointer for each factor, or with a quantised one
        self.pointers = ctypes.c_void_p * len(structure.factors)
        self.quantized = QuantizedFactor * len(structure.factors)
        # of all intermediates, for one input vector
        self.intermediate_size = 0
        layouts = {
            f.name: f.batch + f.new + f.contracted if i in matrices else f.axes for i, f in enumerate(structure.factors)
        }
        numbers = [len(structure.factors), len(structure.terms), structure.in_features, structure.out_features]
        for i, term in enumerate(structure.terms):
            source = term.inputs
            for factor, following in zip(term.factors, (*term.factors[1:], None), strict=True):
                # groups in the order in which the factor lies, so that it is read in large pieces
                layout = layouts[factor.name]
                batch, contracted = (tuple(a for a in layout if a in g) for g in (factor.batch, factor.contracted))
                free, new = tuple(a for a in source if a in factor.free), factor.new
                result = term.outputs
                if following is not None:
                    # laid out as the next step reads it
                    result = tuple(a for a in layouts[following.name] if a in following.batch)
                    result += tuple(a for a in source + new if a in following.free)
                    result += tuple(a for a in layouts[following.name] if a in following.contracted)
                    self.intermediate_size += self._size(result)
                numbers += [i, factor is term.factors[0], following is None]
                numbers += map(self._size, (batch, free, new, contracted, source, result))
                tables = [self._offsets(group, source) for group in (batch, free, contracted)]
                tables += [self._offsets(group, result) for group in (batch, free, new)]
                tables += [self._offsets(group, layout) for group in (batch, new, contracted)]
                numbers += [_stride(tables[i]) for i in (2, 5, 7, 8)]
                numbers += itertools.chain(*tables)
                source = result
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._numbers)

    def _size(self, axes: Axes) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _offsets(self, group: Axes, layout: Axes) -> list[int]:
        """Return where the entries of a group of axes lie in row-major memory of a layout."""
        offsets = [0]
        for axis in group:
            stride = self._size(layout[layout.index(axis) + 1 :])
            offsets = [start + stride * i for start in offsets for i in range(self._sizes[axis])]
        return offsets


program_of = lru_cache(maxsize=4096)(Program)


def _stride(offsets: Sequence[int]) -> int:
    """Return the distance of two neighbours, or 0 where that is not constant."""
    stride = offsets[1] if len(offsets) > 1 else 1
    return stride if all(offset == i * stride for i, offset in enumerate(offsets)) else 0
