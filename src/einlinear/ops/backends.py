"""The backends: their interface, their registry, and the check of operands before each of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einlinear.ops.operands import Gradients, Operands
from einlinear.structures import Structure


class Entry(NamedTuple):
    """The registry's entry of a backend, known before its module is imported."""

    # in `einlinear.ops`, with functions `reason_unsupported`, `forward` and `backward`; None for the reference
    module: str | None
    # a candidate on the CPU, with coefficients in costs.json
    on_cpu: bool = False
    # its backward pass may recompute the intermediates where that is cheaper than to save them
    recomputes: bool = False
    # made of torch's operators alone, so that torch.compile can fuse it
    fusible: bool = False
    # in `einlinear.ops`, with functions `forward` and `backward` of whole feed-forward blocks; None if it has none
    fused_blocks: str | None = None


REGISTRY = {
    "reference": Entry(None, on_cpu=True, fusible=True),
    "batched": Entry("batched.batched_backend", on_cpu=True, fusible=True),
    "cpu": Entry("cpu.cpu_backend", on_cpu=True, recomputes=True, fused_blocks="cpu.fused_block"),
    "triton": Entry("triton.triton_backend", fused_blocks="triton.chunked_block"),
}
BACKENDS = tuple(REGISTRY)
CPU_BACKENDS = tuple(name for name, entry in REGISTRY.items() if entry.on_cpu)


class Backend:
    """The functions of a backend's module, behind the check of operands (`Operands.check`)."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(self, operands: Operands, save: bool) -> tuple[Tensor, list[Tensor]]:
        """Return y of shape (n, out_features), and the intermediates if they are to be saved, without a routing."""
        if operands.check():
            operands = operands.resolve_neg()
        return self.module.forward(operands, save)  # type: ignore[no-any-return]

    def backward(
        self, operands: Operands, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
    ) -> Gradients:
        """Return the gradients that are needed, given that of y; intermediates that were not saved are recomputed.

        With a routing, `needs_x` stands for the gates as well: both gradients come from the same product.
        """
        if operands.check(grad, saved):
            operands, grad = operands.resolve_neg(), grad.resolve_neg()
            saved = [tensor.resolve_neg() for tensor in saved]
        return self.module.backward(operands, grad, saved, needs_x, needs_factors)  # type: ignore[no-any-return]


@cache
def find(name: str) -> Backend:
    """Return a backend, imported at its first use. Raises ValueError for the reference, or an unknown backend."""
    module = REGISTRY[check_name(name)].module
    if module is None:
        raise ValueError(f"{name!r} consists of plain operators: choose a backend with a backward pass of its own")
    return Backend(importlib.import_module(f"einlinear.ops.{module}"))


@cache
def find_fused_blocks(name: str) -> Any:
    """Return the module of a backend's fused blocks, imported at its first use. Raises ValueError if it has none."""
    module = REGISTRY[check_name(name)].fused_blocks
    if module is None:
        raise ValueError(f"the backend {name!r} has no fused feed-forward blocks")
    return importlib.import_module(f"einlinear.ops.{module}")


def check_support(name: str, operands: Operands) -> None:
    """Raise RuntimeError if a backend cannot run with these operands, and ValueError for an unknown backend."""
    why = reason_unsupported(name, operands.structure, operands.x.dtype, operands.x.device)
    if why is not None:
        raise RuntimeError(f"the backend {name!r} cannot run this: {why}")


def reason_unsupported(name: str, structure: Structure, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return why a backend cannot run a structure, or None if it can.

    Raises:
        ValueError: an unknown backend.

    Example:
        >>> import torch, einlinear as el
        >>> reason_unsupported("cpu", el.structure("btt", 64, 64), torch.float32, "cuda")
        'it runs on the CPU, not on cuda'
    """
    if check_name(name) == "reference":
        return None
    return find(name).module.reason_unsupported(structure, dtype, torch.device(device))  # type: ignore[no-any-return]


def check_name(name: str) -> str:
    """Return the name of a backend. Raises ValueError that lists them if it is none."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return name
