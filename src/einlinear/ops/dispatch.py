"""Which executor runs: one place decides, by what was measured, and says so.

Executors are modules with the functions of `Executor`. The cheapest of those that can run is chosen, by a cost model
with a handful of coefficients per executor, fitted to a run of ``einlinear bench`` (docs/benchmarks). They are those
of one machine, but only their ratios count.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from einlinear.structures import Structure

EXECUTORS = ("reference", "bmm", "tiles", "triton")
CPU_EXECUTORS = EXECUTORS[:3]
_MODULES = {"bmm": "bmm", "tiles": "tiles", "triton": "triton_kernels.executor"}
COSTS_FILE = Path(__file__).with_name("costs.json")  # written by einlinear.bench.fitting
CACHED = 2**18  # weights: a core's cache of a megabyte, in float32
CHEAP = 100  # MACs that take the compiled kernel as long as to write a number and read it: by docs/benchmarks/cpu


class Executor(Protocol):
    """What the modules of all executors but the reference have: it is differentiated by autograd itself."""

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


@cache
def find(name: str) -> Executor:
    """The module of an executor, imported when it is first wanted: Triton is slow to import, and optional."""
    return cast(Executor, importlib.import_module(f"einlinear.ops.{_MODULES[name]}"))


def unsupported(name: str, structure: Structure, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why an executor cannot run a structure, or None if it can.

    >>> import torch, einlinear as el
    >>> unsupported("tiles", el.structure("btt", 64, 64), torch.float32, "cuda")
    'it runs on the CPU, not on cuda'
    """
    device = torch.device(device)
    if _checked(name) == "reference":
        return None
    return find(name).unsupported(structure, dtype, device)


@dataclass
class _Forced:
    executor: str | None = None
    recompute: bool | None = None


forced = _Forced()


@contextmanager
def backend(executor: str | None = None, *, recompute: bool | None = None) -> Iterator[None]:
    """Force how structured layers are run, for the whole process, as long as the context lasts.

    Args:
        executor: "reference" (plain einsum), "bmm" (batched matmuls), "tiles" (compiled CPU kernel), "triton" (GPU
            kernels); None leaves the choice where it was: with the dispatcher, or with a context around this one.
        recompute: whether the backward pass computes the intermediate states again (True) or finds them saved (False);
            None leaves it where it was: what was measured to be faster.

    A function that torch.compile has compiled keeps what was chosen when it was traced.

    Raises:
        ValueError: an unknown executor.
        RuntimeError: on use, an executor that cannot run what it is given.

    Example:
        >>> import torch, einlinear as el
        >>> layer, x = el.Linear(64, 64, "btt"), torch.randn(2, 64)
        >>> with el.backend("reference"):
        ...     y = layer(x)
        >>> torch.allclose(y, layer(x), atol=1e-5)
        True
    """
    before = forced.executor, forced.recompute
    forced.executor = forced.executor if executor is None else _checked(executor)
    forced.recompute = forced.recompute if recompute is None else recompute
    try:
        yield
    finally:
        forced.executor, forced.recompute = before


def recomputes(executor: str, structure: Structure) -> bool:
    """Whether a backward pass computes the states between factors again, rather than find them saved."""
    if forced.recompute is not None:
        return forced.recompute
    return executor == "tiles" and _repeats(structure)


@lru_cache(maxsize=4096)
def _repeats(structure: Structure) -> bool:
    again = sum(factor.macs for term in structure.terms for factor in term.factors[:-1])
    return again < CHEAP * sum(term.state_size for term in structure.terms)


@dataclass(frozen=True)
class Choice:
    """Which executor runs, and why.

    Attributes:
        executor: its name.
        reason: one sentence.
        estimates: microseconds by the cost model, of the executors that can run and of dense.
        refusals: why the others cannot.
    """

    executor: str
    reason: str
    estimates: tuple[tuple[str, float], ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.executor}: {self.reason}"]
        lines += [f"  {name:<10} about {us:,.0f} us" for name, us in self.estimates]
        lines += [f"  {name:<10} cannot: {why}" for name, why in self.refusals]
        return "\n".join(lines)


def choose(
    structure: Structure, tokens: int, dtype: torch.dtype, device: torch.device, training: bool = False
) -> Choice:
    """The executor for this many tokens, forward only or with a backward pass; chosen once for every power of two."""
    if forced.executor is not None:
        why = unsupported(forced.executor, structure, dtype, device)
        if why is not None:
            raise RuntimeError(f"einlinear.backend({forced.executor!r}) forces an executor that cannot run here: {why}")
        return Choice(forced.executor, "forced by einlinear.backend")
    return _cheapest(structure, max(tokens - 1, 0).bit_length(), dtype, device.type, training)


@lru_cache(maxsize=65536)
def _cheapest(structure: Structure, tokens_log2: int, dtype: torch.dtype, device_type: str, training: bool) -> Choice:
    """On the CPU by the cost model, which was fitted to float32."""
    device = torch.device(device_type)
    refused = {name: unsupported(name, structure, dtype, device) for name in EXECUTORS}
    able = [name for name, why in refused.items() if why is None]
    refusals = tuple((name, why) for name, why in refused.items() if why is not None)
    if device_type != "cpu":  # not measured yet: kernels where there are any
        order: tuple[str, ...] = ("triton", "bmm", "reference")
        best = next(name for name in order if name in able)
        return Choice(best, "the first of triton, bmm and reference that can run", (), refusals)
    if dtype not in (torch.float32, torch.float64):
        return Choice("reference", "strided matmuls of half precision are slow on the CPU", (), refusals)
    if "tiles" in able:
        left = {"bmm": "it stands in for tiles where these cannot run"}
        if training and not _light(structure, 2**tokens_log2):
            left["reference"] = "it may keep more for backward than nn.Linear does"
        refusals += tuple(left.items())
        able = [name for name in able if name not in left]
    mode = "train" if training else "forward"
    names = [name for name in ("dense", *CPU_EXECUTORS) if name in (*able, "dense")]
    costs = {name: microseconds(name, structure, 2**tokens_log2, mode) for name in names}
    best = min(names[1:], key=costs.__getitem__)
    doing = "a training step" if training else "a forward pass"
    reason = f"the cheapest that can run, by the cost model, for {doing} of {2**tokens_log2} tokens"
    if costs["dense"] < costs[best]:
        reason += "; a dense layer would be faster"
    return Choice(best, reason, tuple(sorted(costs.items(), key=lambda item: item[1])), refusals)


def _light(structure: Structure, tokens: int) -> bool:
    """Whether activations are few beside the weights that a dense layer has more, and so has gradients of.

    Then the peak memory of a training step stays below that of `torch.nn.Linear` even where activations are copied, as
    the reference does (docs/benchmarks/cpu).
    """
    activations = tokens * (structure.in_features + sum(factor.width for factor in structure.factors))
    return activations < 1.5 * (structure.in_features * structure.out_features - structure.params)


def forget() -> None:
    """Choose anew: costs, or what can run, have changed."""
    _cheapest.cache_clear()


def read_costs() -> dict[str, dict[str, list[float]]]:
    """The coefficients of the cost model: per kind of pass ("forward", "train") and executor, what `amounts` costs."""
    content = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    return {mode: content[mode] for mode in ("forward", "train")}


COSTS = read_costs()


def microseconds(executor: str, structure: Structure, tokens: int, mode: str) -> float:
    """What the cost model says of a pass on the CPU; "dense" is `torch.nn.Linear` of the same size."""
    return sum(
        c * amount for c, amount in zip(COSTS[mode][executor], amounts(executor, structure, tokens), strict=True)
    )


def amounts(executor: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """What the coefficients multiply.

    Calls, steps, million MACs, million activations moved, million weights read, and million weights that are read for
    every token (or every tile of them) since they are more than stay in cache.
    """
    in_features, out_features = structure.in_features, structure.out_features
    if executor == "dense":
        weights = in_features * out_features
        return 1, 1, tokens * weights / 1e6, tokens * (in_features + out_features) / 1e6, weights / 1e6, 0
    moved = tokens * (in_features + sum(factor.width for factor in structure.factors)) / 1e6
    spilt = tokens * max(structure.params - CACHED, 0) / 1e6
    return 1, len(structure.factors), tokens * structure.macs / 1e6, moved, structure.params / 1e6, spilt


def explain(layer: Any, x: Tensor) -> Choice:
    """Which executor a layer uses for an input, and why; for training or not, as gradients are wanted or not.

    Args:
        layer: an `einlinear.Linear`.
        x: an input of it, (..., in_features).

    Raises:
        TypeError: something else is given.

    Example:
        >>> import torch, einlinear as el
        >>> print(el.explain(el.Linear(64, 64, "btt"), torch.randn(8, 64)).executor in el.ops.EXECUTORS)
        True
    """
    structure = getattr(layer, "structure", None)
    if not isinstance(structure, Structure):
        raise TypeError(f"expected an einlinear.Linear, not {type(layer).__name__}")
    training = wants_gradients(x, *layer.parameters())
    return choose(structure, x.numel() // structure.in_features, autocast_dtype(x) or x.dtype, x.device, training)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of an input, or None where it leaves it alone."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else None


def _checked(name: str) -> str:
    if name not in EXECUTORS:
        raise ValueError(f"unknown executor {name!r}: choose {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}")
    return name
