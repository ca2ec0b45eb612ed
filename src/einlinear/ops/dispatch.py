"""Which backend runs: one place decides, by what was measured, and says so.

On the CPU that is the cheapest of those that can run, by the cost model (`costs.py`). On a GPU nothing is measured yet,
so it is torch's batched matmuls. A user can force one (`backend`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from einlinear.ops.backends import BACKENDS, CPU_BACKENDS, DECLARED, check_name, unsupported
from einlinear.ops.costs import DENSE, microseconds
from einlinear.structures import Structure

MANY_TOKENS = 2048  # what is chosen for a compiler, which traces once for any number
_KINDS = {Tensor, nn.Parameter, FakeTensor, type(None)}  # others have rules of their own
CHEAP = 100  # MACs that the compiled kernel does while a number is written and read again (docs/benchmarks/cpu)


@dataclass(frozen=True)
class Forced:
    """What `backend` forces; None is not forced."""

    backend: str | None = None
    recompute: bool | None = None


_FREE = Forced()
# of every `backend` block that is open, the outermost first
_FORCED: ContextVar[tuple[Forced, ...]] = ContextVar("einlinear.backend", default=())


def forced() -> Forced:
    """What is forced in this thread or task."""
    blocks = _FORCED.get()
    if not blocks:
        return _FREE
    backend = recompute = None
    for block in blocks:
        backend = backend if block.backend is None else block.backend
        recompute = recompute if block.recompute is None else block.recompute
    return Forced(backend, recompute)


@contextmanager
def backend(backend: str | None = None, *, recompute: bool | None = None) -> Iterator[None]:
    """Force how structured layers are run, in this thread or asyncio task, as long as the context lasts.

    Other threads and tasks do not see it: a new task starts with what is forced where it is created, a new thread with
    nothing forced, unless it runs in a copy of the context (`contextvars.copy_context`). A backward pass uses the
    backend of its forward pass, in any thread. Activation checkpointing on a GPU runs layers again in a thread of
    torch's own, where nothing is forced. Can also decorate a function.

    Args:
        backend: "reference" (plain einsum), "batched" (batched matmuls), "cpu" (compiled CPU kernel), "triton" (GPU
            kernels); None leaves the choice where it was: with the dispatcher, or with a context around this one.
        recompute: whether the backward pass computes the intermediate states again (True) or finds them saved (False);
            None leaves it as it was, by default as was measured to be faster.

    A function that torch.compile has compiled keeps what was chosen when it was traced. Inside of such a function, the
    context ends the graph, which is an error with `fullgraph=True`: put it around the call.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: on use, an backend that cannot run what it is given.

    Example:
        >>> import torch, einlinear as el
        >>> layer, x = el.Linear(64, 64, "btt"), torch.randn(2, 64)
        >>> with el.backend("reference"):
        ...     y = layer(x)
        >>> torch.allclose(y, layer(x), atol=1e-5)
        True
    """
    own = Forced(None if backend is None else check_name(backend), recompute)
    _FORCED.set((*_FORCED.get(), own))
    try:
        yield
    finally:
        # its own entry alone: generators end in any order, and may be closed in another context than they began in
        _FORCED.set(tuple(block for block in _FORCED.get() if block is not own))


def recomputes(backend: str, structure: Structure) -> bool:
    """Whether a backward pass computes the states between factors again, rather than find them saved."""
    recompute = forced().recompute
    if recompute is not None:
        return recompute
    return DECLARED[backend].recomputes and _repeats(structure)


@lru_cache(maxsize=4096)
def _repeats(structure: Structure) -> bool:
    again = sum(factor.macs for term in structure.terms for factor in term.factors[:-1])
    return again < CHEAP * sum(term.intermediate_size for term in structure.terms)


@dataclass(frozen=True)
class Choice:
    """Which backend runs, and why.

    Attributes:
        backend: its name.
        reason: one sentence.
        estimates: microseconds by the cost model, of the backends that can run and of dense.
        refusals: the others, and why they cannot run or are left out.
    """

    backend: str
    reason: str
    estimates: tuple[tuple[str, float], ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  {name:<10} about {us:,.0f} us" for name, us in self.estimates]
        lines += [f"  {name:<10} cannot: {why}" for name, why in self.refusals]
        return "\n".join(lines)


def choose(
    structure: Structure, tokens: int, dtype: torch.dtype, device: torch.device, training: bool = False
) -> Choice:
    """The backend for this many tokens, forward only or with a backward pass; chosen once for every power of two."""
    backend = forced().backend
    if backend is not None:
        why = unsupported(backend, structure, dtype, device)
        if why is not None:
            raise RuntimeError(f"einlinear.backend({backend!r}) forces an backend that cannot run here: {why}")
        return Choice(backend, "forced by einlinear.backend")
    return _cheapest(structure, max(tokens - 1, 0).bit_length(), dtype, device.type, training)


@lru_cache(maxsize=65536)
def _cheapest(structure: Structure, tokens_log2: int, dtype: torch.dtype, device_type: str, training: bool) -> Choice:
    """On the CPU by the cost model, which was fitted to float32."""
    device = torch.device(device_type)
    refused = {name: unsupported(name, structure, dtype, device) for name in BACKENDS}
    able = [name for name, why in refused.items() if why is None]
    refusals = tuple((name, why) for name, why in refused.items() if why is not None)
    if not dtype.is_floating_point:
        return Choice("reference", "the others compute with real numbers", (), refusals)
    if device_type != "cpu":
        if "triton" in able:
            refusals += (("triton", "it has not been measured on a GPU yet: einlinear.backend('triton') takes it"),)
        return Choice("batched", "strided matmuls of torch, which run on every device", (), refusals)
    if dtype not in (torch.float32, torch.float64):
        return Choice("reference", "strided matmuls of half precision are slow on the CPU", (), refusals)
    if "cpu" in able:
        left = {"batched": "it stands in for tiles where these cannot run"}
        if training and not _light(structure, 2**tokens_log2):
            left["reference"] = "it may keep more for backward than nn.Linear does"
        refusals += tuple(left.items())
        able = [name for name in able if name not in left]
    mode = "train" if training else "forward"
    able = [name for name in CPU_BACKENDS if name in able]
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
    activations = tokens * (structure.in_features + sum(factor.result_size for factor in structure.factors))
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
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return "plain"
    kinds = set(map(type, tensors))
    if not kinds <= _KINDS:
        return "plain"
    return "traced" if FakeTensor in kinds or torch._C._len_torch_dispatch_stack() > 0 else "eager"


def differentiable(grad: Tensor, *others: Tensor) -> bool:
    """Whether a backward pass has to work in plain operators: since it is differentiated itself, or batched."""
    return (
        torch.is_grad_enabled() or seen(grad, *others) == "plain" or torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def of_one_dtype(
    x: Tensor, factors: Sequence[Tensor], bias: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """All of them as autocast makes them, if it is on."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, factors, bias
    x, bias, *factors = (_cast(tensor, dtype) for tensor in (x, bias, *factors))
    return x, factors, bias


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of an input, or None where it leaves it alone."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and _is_cast(x) else None


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, Tensor) and _is_cast(tensor) else tensor


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast touches such a tensor at all."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64
