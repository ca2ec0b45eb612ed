"""Which executor runs: one place decides, by what was measured, and says so.

On the CPU that is the cheapest of those that can run, by the cost model (`costs.py`). On a GPU nothing is measured yet,
so it is torch's batched matmuls. A user can force one (`backend`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from einlinear.ops.costs import DENSE, microseconds
from einlinear.ops.executors import CPU_EXECUTORS, DECLARED, EXECUTORS, check_name, unsupported
from einlinear.structures import Structure

MANY_TOKENS = 2048  # what is chosen for a compiler, which traces once for any number
CHEAP = 100  # MACs that the compiled kernel does while a number is written and read again (docs/benchmarks/cpu)


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
            None leaves it as it was, by default as was measured to be faster.

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
    forced.executor = forced.executor if executor is None else check_name(executor)
    forced.recompute = forced.recompute if recompute is None else recompute
    try:
        yield
    finally:
        forced.executor, forced.recompute = before


def recomputes(executor: str, structure: Structure) -> bool:
    """Whether a backward pass computes the states between factors again, rather than find them saved."""
    if forced.recompute is not None:
        return forced.recompute
    return DECLARED[executor].recomputes and _repeats(structure)


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
        refusals: the others, and why they cannot run or are left out.
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
    if device_type != "cpu":
        if "triton" in able:
            refusals += (("triton", "it has not been measured on a GPU yet: einlinear.backend('triton') takes it"),)
        return Choice("bmm", "strided matmuls of torch, which run on every device", (), refusals)
    if dtype not in (torch.float32, torch.float64):
        return Choice("reference", "strided matmuls of half precision are slow on the CPU", (), refusals)
    if "tiles" in able:
        left = {"bmm": "it stands in for tiles where these cannot run"}
        if training and not _light(structure, 2**tokens_log2):
            left["reference"] = "it may keep more for backward than nn.Linear does"
        refusals += tuple(left.items())
        able = [name for name in able if name not in left]
    mode = "train" if training else "forward"
    able = [name for name in CPU_EXECUTORS if name in able]
    costs = {name: microseconds(name, structure, 2**tokens_log2, mode) for name in (DENSE, *able)}
    best = min(able, key=costs.__getitem__)
    doing = "a training step" if training else "a forward pass"
    reason = f"the cheapest that can run, by the cost model, for {doing} of {2**tokens_log2} tokens"
    if costs[DENSE] < costs[best]:
        reason += "; a dense layer would be faster"
    return Choice(best, reason, tuple(sorted(costs.items(), key=lambda item: item[1])), refusals)


def _light(structure: Structure, tokens: int) -> bool:
    """Whether the activations are few compared with the weights, and their gradients, that dense has more than ours.

    Then the peak memory of a training step stays below that of `torch.nn.Linear` even where activations are copied, as
    the reference does (docs/benchmarks/cpu).
    """
    activations = tokens * (structure.in_features + sum(factor.width for factor in structure.factors))
    return activations < 1.5 * (structure.in_features * structure.out_features - structure.params)


def forget() -> None:
    """Forget all choices, because the costs have changed, or what can run."""
    _cheapest.cache_clear()


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def seen(*tensors: Tensor | None) -> str:
    """How tensors are to be worked on: "plain", in operators that any runtime, transform or kind of tensor knows;
    "traced", by an operator of our own; or "eager"."""
    if torch.compiler.is_exporting():
        return "plain"
    if torch.compiler.is_compiling():
        return "traced"
    if torch._C._are_functorch_transforms_active():
        return "plain"
    kinds = {type(tensor) for tensor in tensors} - {Tensor, nn.Parameter, type(None)}
    if kinds - {FakeTensor}:
        return "plain"
    return "traced" if kinds or torch._C._len_torch_dispatch_stack() > 0 else "eager"


def of_one_dtype(
    x: Tensor, factors: Sequence[Tensor], bias: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """All of them as autocast makes them.

    Raises:
        RuntimeError: it leaves them alone, and the input is of another dtype than the factors.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype), [factor.to(dtype) for factor in factors], None if bias is None else bias.to(dtype)
    if x.dtype != factors[0].dtype:
        raise RuntimeError(f"the input is of {x.dtype}, but the layer of {factors[0].dtype}: convert one of them")
    return x, factors, bias


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of an input, or None where it leaves it alone."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else None
