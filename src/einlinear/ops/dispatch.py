"""Dispatch: the choice of a backend, on a CPU the cheapest by a cost model that was fitted to measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from einlinear import structures
from einlinear.ops.backends import BACKENDS, CPU_BACKENDS, REGISTRY, reason_unsupported
from einlinear.ops.context import forced
from einlinear.ops.cost_model import DENSE, activations_moved, amounts, costs
from einlinear.structures import Structure

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why.

    Attributes:
        backend: its name.
        reason: one sentence.
        estimates: microseconds by the cost model, of the backends that can run and of dense.
        refusals: the others, and why they cannot run or are left out.
        kernels: of the backend "cpu", in `el.explain`: prebuilt or compiled, and for which processor.
    """

    backend: str
    reason: str
    estimates: tuple[tuple[str, float], ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()
    kernels: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  kernels    {self.kernels}"] if self.kernels else []
        lines += [f"  {name:<10} about {us:,.0f} us" for name, us in self.estimates]
        lines += [f"  {name:<10} not chosen: {why}" for name, why in self.refusals]
        return "\n".join(lines)


_CACHES: list[Any] = []


def cached(function: F) -> F:
    """Cache the results of a function that depends on costs, or on which backends can run, until `forget`."""
    cache = lru_cache(maxsize=65536)(function)
    _CACHES.append(cache)
    # lru_cache does not keep the signature
    return cache  # type: ignore[return-value]


def choose(
    structure: Structure,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
    routed: bool = False,
) -> Choice:
    """Return the backend for a product: the forced one, or the best for these arguments.

    Args:
        structure: of the matrix.
        tokens: their number; with a routing, for each expert on average. One choice serves every power of two.
        dtype, device: of the operands.
        training: whether a backward pass may follow.
        routed: whether the product has a routing.

    Raises:
        RuntimeError: the forced backend cannot run the structure.
    """
    backend = forced().backend
    if backend is not None:
        why = reason_unsupported(backend, structure, dtype, device)
        if why is not None:
            raise RuntimeError(f"einlinear.backend({backend!r}) forces a backend that cannot run here: {why}")
        return Choice(backend, "forced by einlinear.backend")
    choice = _cheapest(structure, max(tokens - 1, 0).bit_length(), dtype, device.type, training)
    # with a routing the reference would multiply every token with every expert
    if routed and choice.backend == "reference" and reason_unsupported("batched", structure, dtype, device) is None:
        return Choice("batched", "one expert after the other, for which the reference has no means")
    return choice


def assume_constant_result(function: F) -> F:
    """Do as `torch.compiler.assume_constant_result`, which takes longer to import than torch: set the same mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def choose_for_compiler(
    spec: str, in_features: int, out_features: int, dtype: torch.dtype, device: str, routed: bool
) -> str:
    """Return the backend that torch.compile traces: a kernel as it is, or operators that it fuses: the reference's."""
    structure = structures.structure(spec, in_features, out_features)
    # a compiler traces once for any number of tokens: the choice is that for many
    backend = choose(structure, 2048, dtype, torch.device(device), training=routed, routed=routed).backend
    fuses = REGISTRY[backend].fusible and not routed and forced().backend is None
    return "reference" if fuses else backend


@cached
def _cheapest(structure: Structure, tokens_log2: int, dtype: torch.dtype, device_type: str, training: bool) -> Choice:
    """Return the choice that nothing forces; on the CPU by the cost model, which was fitted to float32."""
    device, tokens = torch.device(device_type), 2**tokens_log2
    reasons = {name: reason_unsupported(name, structure, dtype, device) for name in BACKENDS}
    refusals = {name: why for name, why in reasons.items() if why is not None}
    if not dtype.is_floating_point:
        return Choice("reference", "the others compute with real numbers", (), tuple(refusals.items()))
    if device_type != "cpu":
        refusals.setdefault("triton", "it has not been measured on a GPU yet: einlinear.backend('triton') takes it")
        return Choice("batched", "strided matmuls of torch, which run on every device", (), tuple(refusals.items()))
    if dtype not in (torch.float32, torch.float64):
        best, reason = "reference", "strided matmuls of half precision are slow on the CPU"
        if "cpu" not in refusals:
            best, reason = "cpu", "it reads and writes half precision and computes in float32"
        return Choice(best, reason, (), tuple(refusals.items()))
    if "cpu" not in refusals:
        refusals["batched"] = "it stands in for the compiled kernel where that cannot run"
        # else training needs less memory than nn.Linear even if activations are copied (docs/benchmarks/cpu)
        saved_weights = structure.in_features * structure.out_features - structure.params
        if training and activations_moved(structure, tokens) >= 1.5 * saved_weights:
            refusals["reference"] = "it may keep more for backward than nn.Linear does"
    mode = "train" if training else "forward"
    candidates = [name for name in CPU_BACKENDS if name not in refusals]
    coefficients = costs().coefficients[mode]
    summands = {name: zip(coefficients[name], amounts(name, structure, tokens)) for name in (DENSE, *candidates)}
    times = {name: sum(coefficient * amount for coefficient, amount in pairs) for name, pairs in summands.items()}
    best = min(candidates, key=times.__getitem__)
    step = "a training step" if training else "a forward pass"
    reason = f"the cheapest that can run, by the cost model with {costs().source}, for {step} of {tokens} tokens"
    if times[DENSE] < times[best]:
        reason += "; a dense layer would be faster"
    estimates = sorted(times.items(), key=lambda item: item[1])
    return Choice(best, reason, tuple(estimates), tuple(refusals.items()))


def recomputes(backend: str, structure: Structure) -> bool:
    """Return whether a backward pass recomputes the intermediates between factors, rather than find them saved."""
    recompute = forced().recompute
    return REGISTRY[backend].recomputes and _is_cheap_to_recompute(structure) if recompute is None else recompute


@lru_cache(maxsize=4096)
def _is_cheap_to_recompute(structure: Structure) -> bool:
    macs = sum(factor.macs for term in structure.terms for factor in term.factors[:-1])
    # the compiled kernel does 100 MACs while a number is written and read again (docs/benchmarks/cpu)
    return macs < 100 * sum(term.intermediate_size for term in structure.terms)


def forget() -> None:
    """Forget all cached choices, because the costs have changed, or which backends can run."""
    costs.cache_clear()
    for cache in _CACHES:
        cache.cache_clear()
