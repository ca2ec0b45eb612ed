"""The compiled CPU executor: tiles of tokens that stay in cache.

The kernel (tiles.cpp) knows no structure, it gets a program (program.py). Without a compiler (build.py) the other
executors do its work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.ops.tiles.build import DTYPES, Library, load
from einlinear.ops.tiles.program import program_of
from einlinear.structures import Structure


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this executor cannot run, or None if it can."""
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
        tile: int = _function("tile", x.dtype)(program.address, n)
        saved = [x.new_empty(-(-n // tile) * tile * program.state_rows)]
    if n:
        _function("forward", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
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
    held = [factor.contiguous() for factor in factors]
    grad_x = torch.empty_like(x) if needs_x else None
    fresh = torch.empty_like if x.shape[0] else torch.zeros_like
    grad_factors = [fresh(factor) if wanted else None for factor, wanted in zip(held, needs_factors, strict=True)]
    if x.shape[0]:
        _function("backward", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
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
    structure: Structure, factors: Sequence[Tensor], x: Tensor, first: Tensor, order: Tensor, gates: Tensor
) -> Tensor:
    """The output of every pair of a token and an expert, (n, active, out_features); see `ops.grouped`.

    Args:
        structure: of every expert.
        factors: stacked, (experts, *shape of the factor).
        x: (n, in_features).
        first: (experts + 1,), where the pairs of every expert begin in `order`; int64, as `order` is.
        order: (n * active,), the pairs sorted by expert; pair i is of token i // active.
        gates: (n, active), what the input of a pair is multiplied with.
    """
    program, x, gates = program_of(structure), x.contiguous(), gates.contiguous()
    held = [factor.contiguous() for factor in factors]
    y = x.new_empty(*gates.shape, structure.out_features)
    if y.numel():
        _function("forward_grouped", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
            first.data_ptr(),
            order.data_ptr(),
            gates.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            len(first) - 1,
            gates.shape[1],
            _threads(structure.macs * gates.numel()),
        )
    return y


def backward_grouped(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    first: Tensor,
    order: Tensor,
    gates: Tensor,
    grad: Tensor,
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the gated input of every pair, (n, active, in_features), and of the stacked factors."""
    program, x, gates, grad = program_of(structure), x.contiguous(), gates.contiguous(), grad.contiguous()
    held = [factor.contiguous() for factor in factors]
    grad_x = x.new_empty(*gates.shape, structure.in_features) if needs_x else None
    # experts without tokens are not written
    found = [torch.zeros_like(factor) if wanted else None for factor, wanted in zip(held, needs_factors, strict=True)]
    if gates.numel():
        _function("backward_grouped", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
            first.data_ptr(),
            order.data_ptr(),
            gates.data_ptr(),
            x.data_ptr(),
            grad.data_ptr(),
            None if grad_x is None else grad_x.data_ptr(),
            program.pointers(*(None if g is None else g.data_ptr() for g in found)),
            len(first) - 1,
            gates.shape[1],
            _threads(structure.macs * gates.numel()),
        )
    return grad_x, found


def _threads(macs: int) -> int:
    """More than one only where starting them is worth it: that takes about as long as 100,000 MACs."""
    return torch.get_num_threads() if macs > 300_000 else 1


def _function(role: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    library = load()
    assert isinstance(library, Library), "the dispatcher asks `unsupported` first"
    return library.functions[role, dtype]
