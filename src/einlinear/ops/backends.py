"""The backends: their interface, their registry, and the check of operands before each of them.

A backend is a module with the functions of `Backend`. Adding one takes a folder and a line in `REGISTRY`.
The reference is not one of these modules, since autograd itself differentiates it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from einlinear.ops import operands
from einlinear.ops.product import Gradients, Product
from einlinear.structures import Structure


class Backend(Protocol):
    """The functions of a backend's module."""

    def unsupported(self, structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return why the backend cannot run, or None if it can."""

    def forward(self, product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
        """Return y of shape (n, out_features), and the intermediates for `backward` if they are to be saved.

        With a routing, no intermediates are saved.
        """

    def backward(
        self, product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
    ) -> Gradients:
        """Return the gradients that are needed, given that of y; intermediates that were not saved are recomputed.

        With a routing, `needs_x` stands for the gates as well: both gradients come from the same product.
        """


@dataclass(frozen=True)
class Entry:
    """The registry's entry of a backend, known before its module is imported.

    Attributes:
        module: in `einlinear.ops`; None for the reference.
        on_cpu: whether it is a candidate on the CPU; costs.json then has coefficients for it.
        recomputes: whether its backward pass may recompute the intermediates where that is cheaper than to save them;
            the others always save them.
        fusible: whether it consists of torch's operators alone, so that torch.compile can fuse it.
    """

    module: str | None
    on_cpu: bool = False
    recomputes: bool = False
    fusible: bool = False


REGISTRY = {
    "reference": Entry(None, on_cpu=True, fusible=True),
    "batched": Entry("batched.batched_backend", on_cpu=True, fusible=True),
    "cpu": Entry("cpu.cpu_backend", on_cpu=True, recomputes=True),
    "triton": Entry("triton.triton_backend"),
}
BACKENDS = tuple(REGISTRY)
CPU_BACKENDS = tuple(name for name, entry in REGISTRY.items() if entry.on_cpu)


@cache
def find(name: str) -> Backend:
    """Return a backend other than the reference, imported at its first use; it refuses operands that do not fit.

    Raises:
        ValueError: an unknown backend, or the reference.
    """
    module = REGISTRY[check_name(name)].module
    if module is None:
        raise ValueError(f"{name!r} consists of plain operators: choose a backend with a backward pass of its own")
    return _Checked(cast(Backend, importlib.import_module(f"einlinear.ops.{module}")))


class _Checked:
    """A backend behind the check of its operands (`operands.check`)."""

    def __init__(self, module: Backend) -> None:
        self.module = module

    def unsupported(self, structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.module.unsupported(structure, dtype, device)

    def forward(self, product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
        if operands.check(*product):
            product = product.resolve_neg()
        return self.module.forward(product, save)

    def backward(
        self, product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
    ) -> Gradients:
        if operands.check(*product, grad=grad, saved=saved):
            product, grad = product.resolve_neg(), grad.resolve_neg()
            saved = [tensor.resolve_neg() for tensor in saved]
        return self.module.backward(product, grad, saved, needs_x, needs_factors)


def find_supporting(name: str, product: Product) -> Backend:
    """Return a backend that can run a product. Raises RuntimeError if it cannot, ValueError if it is unknown."""
    check_support(name, product.structure, product.x.dtype, product.x.device)
    return find(name)


def check_support(name: str, structure: Structure, dtype: torch.dtype, device: torch.device) -> None:
    """Raise RuntimeError if a backend cannot run a structure, and ValueError for an unknown backend."""
    why = unsupported(name, structure, dtype, device)
    if why is not None:
        raise RuntimeError(f"the backend {name!r} cannot run this: {why}")


def unsupported(name: str, structure: Structure, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return why a backend cannot run a structure, or None if it can.

    Raises:
        ValueError: an unknown backend.

    Example:
        >>> import torch, einlinear as el
        >>> unsupported("cpu", el.structure("btt", 64, 64), torch.float32, "cuda")
        'it runs on the CPU, not on cuda'
    """
    if check_name(name) == "reference":
        return None
    return find(name).unsupported(structure, dtype, torch.device(device))


def check_name(name: str) -> str:
    """Return the name of a backend. Raises ValueError that lists them if it is none."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return name
