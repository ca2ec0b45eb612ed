"""The backends: what all of them do, which there are, and what the choice among them has to know of each.

An backend is a module with the functions of `Backend`; the reference is not one of these, since autograd itself
differentiates it. `find` puts the check of all operands before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from einlinear.ops import operands
from einlinear.structures import Structure


class Backend(Protocol):
    """What the module of an backend has."""

    def unsupported(self, structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run, or None."""

    def forward(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """y of shape (n, out_features) for x of shape (n, in_features), and intermediates saved for backward."""

    def backward(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        grad: Tensor,
        saved: Sequence[Tensor],
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of x and of the factors; what was not saved is computed again."""

    def forward_grouped(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """For every token the sum over its experts of W_expert (gate * x), plus a bias; see `ops.grouped`."""

    def backward_grouped(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        grad: Tensor,
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """The gradients of x and of the gates, if `needs_x`, and those of the stacked factors that are needed."""


@dataclass(frozen=True)
class Declaration:
    """An backend as it is known before its module is imported.

    Attributes:
        module: in `einlinear.ops`; None for the reference.
        on_cpu: whether it competes on the CPU, by the cost model, which has coefficients for it.
        recomputes: whether its backward pass may compute the states between factors again where that is cheaper than
            to save them; the others always save them.
        fusible: whether it is made of torch's operators alone. A compiler then does better with the reference, whose
            operators it fuses.
    """

    module: str | None
    on_cpu: bool = False
    recomputes: bool = False
    fusible: bool = False


DECLARED = {
    "reference": Declaration(None, on_cpu=True, fusible=True),
    "batched": Declaration("batched.batched_backend", on_cpu=True, fusible=True),
    "cpu": Declaration("cpu.cpu_backend", on_cpu=True, recomputes=True),
    "triton": Declaration("triton.triton_backend"),
}
BACKENDS = tuple(DECLARED)
CPU_BACKENDS = tuple(name for name, declared in DECLARED.items() if declared.on_cpu)


@cache
def find(name: str) -> Backend:
    """An backend other than the reference, imported when it is first wanted; it refuses operands that do not fit.

    Raises:
        ValueError: an unknown backend, or the reference.
    """
    module = DECLARED[check_name(name)].module
    if module is None:
        raise ValueError(f"{name!r} runs in plain operators: choose an backend with a backward pass of its own")
    return _Checked(cast(Backend, importlib.import_module(f"einlinear.ops.{module}")))


class _Checked:
    """An backend that checks its operands (`operands.check`), and negates those whose negation torch has put off."""

    def __init__(self, module: Backend) -> None:
        self.module = module

    def unsupported(self, structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.module.unsupported(structure, dtype, device)

    def forward(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if operands.check(structure, factors, x, bias):
            x, bias, *factors = _negated(x, bias, *factors)
        return self.module.forward(structure, factors, x, bias, save)

    def backward(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        grad: Tensor,
        saved: Sequence[Tensor],
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        if operands.check(structure, factors, x, grad=grad, saved=saved):
            x, grad, *factors = _negated(x, grad, *factors)
            saved = _negated(*saved)
        return self.module.backward(structure, factors, x, grad, saved, needs_x, needs_factors)

    def forward_grouped(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        if operands.check(structure, factors, x, bias, routing=(indices, gates)):
            x, gates, bias, *factors = _negated(x, gates, bias, *factors)
        return self.module.forward_grouped(structure, factors, x, indices, gates, bias)

    def backward_grouped(
        self,
        structure: Structure,
        factors: Sequence[Tensor],
        x: Tensor,
        indices: Tensor,
        gates: Tensor,
        grad: Tensor,
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        if operands.check(structure, factors, x, grad=grad, routing=(indices, gates)):
            x, gates, grad, *factors = _negated(x, gates, grad, *factors)
        return self.module.backward_grouped(structure, factors, x, indices, gates, grad, needs_x, needs_factors)


def _negated(*tensors: Any) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.resolve_neg() for tensor in tensors)


def check_support(name: str, structure: Structure, dtype: torch.dtype, device: torch.device) -> None:
    """Raise RuntimeError where an backend cannot run a structure, and ValueError for an unknown backend."""
    why = unsupported(name, structure, dtype, device)
    if why is not None:
        raise RuntimeError(f"the backend {name!r} cannot run this: {why}")


def unsupported(name: str, structure: Structure, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why an backend cannot run a structure, or None if it can.

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
    """The name, which is that of an backend. Raises ValueError that lists them if it is not."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return name
