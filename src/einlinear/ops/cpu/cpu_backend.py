"""The compiled CPU backend: tiles of tokens that stay in cache.

The kernel (kernel.cpp) knows no structure, it reads a program (program.py). Without a compiler (kernel_library.py) the
other backends do its work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.cpu.kernel_library import DTYPES, Library, Pairs, load
from einlinear.ops.cpu.program import Program, program_of
from einlinear.ops.product import Assignment, Gradients, Product
from einlinear.structures import Structure

# MACs of a call above which several threads share it: starting them takes about as long as 100,000 MACs
PARALLEL_MACS = 300_000
# pairs of a token and an expert that a block should have for each expert: fewer leave tiles half empty, more do not
# stay in cache
_PAIRS = 128


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this backend cannot run, or None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    library = load()
    return library if isinstance(library, str) else None


def forward(product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates if they are to be saved."""
    structure, factors, x, bias, routing = product
    program, n = program_of(structure), x.shape[0]
    x, factors = x.contiguous(), [factor.contiguous() for factor in factors]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, structure.out_features)
    saved = []
    if save and program.intermediate_size and routing is None:
        tile: int = _function("tile", x)(program.address, n)
        saved = [x.new_empty(-(-n // tile) * tile * program.intermediate_size)]
    if n:
        pairs, threads, _tensors = _schedule(program, factors, routing, n)
        _function("forward", x)(
            program.address,
            program.pointers(*[factor.data_ptr() for factor in factors]),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            saved[0].data_ptr() if saved else None,
            pairs,
            n,
            threads,
        )
    return y, saved


def backward(
    product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    structure, factors, x, _, routing = product
    program = program_of(structure)
    x, grad, factors = x.contiguous(), grad.contiguous(), [factor.contiguous() for factor in factors]
    saved = [tensor.contiguous() for tensor in saved]
    new = torch.empty_like if x.shape[0] else torch.zeros_like
    grad_x = new(x) if needs_x else None
    grad_gates = new(routing.gates.contiguous()) if needs_x and routing is not None else None
    grad_factors = [new(factor) if needed else None for factor, needed in zip(factors, needs_factors, strict=True)]
    if x.shape[0]:
        pairs, threads, _tensors = _schedule(program, factors, routing, x.shape[0])
        _function("backward", x)(
            program.address,
            program.pointers(*[factor.data_ptr() for factor in factors]),
            x.data_ptr(),
            grad.data_ptr(),
            saved[0].data_ptr() if saved else None,
            None if grad_x is None else grad_x.data_ptr(),
            program.pointers(*[None if g is None else g.data_ptr() for g in grad_factors]),
            None if grad_gates is None else grad_gates.data_ptr(),
            pairs,
            x.shape[0],
            threads,
        )
    return Gradients(grad_x, grad_gates, grad_factors)


def _schedule(
    program: Program, factors: Sequence[Tensor], routing: Assignment | None, tokens: int
) -> tuple[object, int, tuple[Tensor, ...]]:
    """Return the sorted pairs of a routing for the kernel, the number of threads, and the tensors behind the pairs."""
    if routing is None:
        return None, torch.get_num_threads() if program.macs * tokens > PARALLEL_MACS else 1, ()
    threads = torch.get_num_threads() if program.macs * routing.indices.numel() > PARALLEL_MACS else 1
    pairs, tensors = _sort_pairs(routing, len(factors[0]), threads)
    return ctypes.byref(pairs), threads, tensors


def _sort_pairs(routing: Assignment, experts: int, threads: int) -> tuple[Pairs, tuple[Tensor, ...]]:
    """Return the pairs of a token and an expert, sorted by block of tokens and by expert, and the tensors behind."""
    indices, gates = routing.indices, routing.gates.contiguous()
    n, active = indices.shape
    # a block should have some full tiles of every expert, and every thread needs one
    block = max(1, min(-(-n // threads), -(-_PAIRS * experts // active)))
    keys = indices
    if block < n:
        keys = indices + (torch.arange(n, device=indices.device) // block * experts)[:, None]
    blocks = -(-n // block)
    # where the pairs of every (block, expert) begin
    first = indices.new_zeros(blocks * experts + 1)
    torch.cumsum(torch.bincount(keys.flatten(), minlength=blocks * experts), 0, out=first[1:])
    order = keys.flatten().argsort(stable=True)
    pointers = first.data_ptr(), order.data_ptr(), gates.data_ptr()
    return Pairs(*pointers, n, block, experts, active), (first, order, gates)


def _function(role: str, x: Tensor) -> ctypes._NamedFuncPointer:
    library = load()
    assert isinstance(library, Library), "the dispatcher asks `unsupported` first"
    if not x.is_cpu:
        raise RuntimeError(f"the compiled kernel runs on the CPU, not on {x.device.type}")
    return library.functions[role, x.dtype]
