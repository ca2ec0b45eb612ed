"""The compiled CPU backend: tiles of tokens that stay in cache.

The kernel (tiles.cpp) knows no structure, it gets a program (program.py). Without a compiler (build.py) the other
backends do its work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.cpu.build import DTYPES, Library, load
from einlinear.ops.cpu.program import program_of
from einlinear.structures import Structure

PARALLEL_MACS = 300_000  # of a call that several threads share
_PAIRS = 128  # of a block and an expert: fewer leave tiles half empty, more do not stay in cache


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this backend cannot run, or None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    library = load()
    return library if isinstance(library, str) else None


def forward(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y = x W^T + bias for x of shape (n, in_features), and the intermediate states if they are to be saved."""
    program, x = program_of(structure), x.contiguous()
    held = [factor.contiguous() for factor in factors]
    bias = None if bias is None else bias.contiguous()
    n = x.shape[0]
    y = x.new_empty(n, structure.out_features)
    saved = []
    if save and program.state_rows:
        tile: int = _function("tile", x)(program.address, n)
        saved = [x.new_empty(-(-n // tile) * tile * program.state_rows)]
    if n:
        _function("forward", x)(
            program.address,
            program.pointers(*[factor.data_ptr() for factor in held]),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            saved[0].data_ptr() if saved else None,
            n,
            _threads(structure.macs * n),
        )
    return y, saved


def backward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the factors, those that are needed; without saved states these are computed again."""
    program, x, grad = program_of(structure), x.contiguous(), grad.contiguous()
    held, saved = [factor.contiguous() for factor in factors], [states.contiguous() for states in saved]
    grad_x = torch.empty_like(x) if needs_x else None
    fresh = torch.empty_like if x.shape[0] else torch.zeros_like
    grad_factors = [fresh(factor) if wanted else None for factor, wanted in zip(held, needs_factors, strict=True)]
    if x.shape[0]:
        _function("backward", x)(
            program.address,
            program.pointers(*[factor.data_ptr() for factor in held]),
            x.data_ptr(),
            grad.data_ptr(),
            saved[0].data_ptr() if saved else None,
            None if grad_x is None else grad_x.data_ptr(),
            program.pointers(*(None if g is None else g.data_ptr() for g in grad_factors)),
            x.shape[0],
            _threads(structure.macs * x.shape[0]),
        )
    return grad_x, grad_factors


def forward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """For every token the sum over its experts of W_expert (gate * x), plus a bias; see `ops.grouped`."""
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], structure.out_features)
    if y.numel():
        last = (None if bias is None else bias.data_ptr(), y.data_ptr())
        _run_grouped("forward_grouped", structure, factors, x, indices, gates, *last)
    return y


def backward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    grad: Tensor,
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the gates, if they are needed, and of those of the stacked factors that are."""
    grad = grad.contiguous()
    grad_x, grad_gates = (_fresh(x), _fresh(gates)) if needs_x else (None, None)
    found = [_fresh(factor) if wanted else None for factor, wanted in zip(factors, needs_factors, strict=True)]
    _run_grouped(
        "backward_grouped",
        structure,
        factors,
        x,
        indices,
        gates,
        grad.data_ptr(),
        None if grad_x is None else grad_x.data_ptr(),
        None if grad_gates is None else grad_gates.data_ptr(),
        program_of(structure).pointers(*(None if g is None else g.data_ptr() for g in found)),
    )
    return grad_x, grad_gates, found


def _run_grouped(
    role: str,
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    *pointers: object,
) -> None:
    """Call the kernel of a role with what both have in common, and its own pointers after the input's."""
    program, x, gates = program_of(structure), x.contiguous(), gates.contiguous()
    held = [factor.contiguous() for factor in factors]
    threads = _threads(structure.macs * gates.numel())
    block, first, order = _pairs(indices, len(held[0]), threads)
    _function(role, x)(
        program.address,
        program.pointers(*[factor.data_ptr() for factor in held]),
        first.data_ptr(),
        order.data_ptr(),
        gates.data_ptr(),
        x.data_ptr(),
        *pointers,
        x.shape[0],
        block,
        len(held[0]),
        gates.shape[1],
        threads,
    )


def _fresh(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _pairs(indices: Tensor, count: int, threads: int) -> tuple[int, Tensor, Tensor]:
    """How many tokens make a block, and the pairs of a token and an expert, sorted by block and expert: where those of
    every (block, expert) begin, and which they are."""
    n, active = indices.shape
    # a block should have some full tiles of every expert, and every thread needs one
    block = max(1, min(-(-n // threads), -(-_PAIRS * count // active)))
    keys = indices
    if block < n:
        keys = indices + (torch.arange(n, device=indices.device) // block * count)[:, None]
    blocks = -(-n // block)
    first = indices.new_zeros(blocks * count + 1)
    torch.cumsum(torch.bincount(keys.flatten(), minlength=blocks * count), 0, out=first[1:])
    return block, first, keys.flatten().argsort(stable=True)


def _threads(macs: int) -> int:
    """More than one only where starting them is worth it: that takes about as long as 100,000 MACs."""
    return torch.get_num_threads() if macs > PARALLEL_MACS else 1


def _function(role: str, x: Tensor) -> ctypes._NamedFuncPointer:
    library = load()
    assert isinstance(library, Library), "the dispatcher asks `unsupported` first"
    if not x.is_cpu:
        raise RuntimeError(f"the compiled kernel runs on the CPU, not on {x.device.type}")
    return library.functions[role, x.dtype]
