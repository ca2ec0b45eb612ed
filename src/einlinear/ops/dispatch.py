"""The choice of a backend: a pure function of structure, tokens, dtype and device.

On a CPU the cheapest backend runs, by a cost model with a few coefficients for each (cost_model.py). The shipped ones were
fitted to runs of ``einlinear bench`` on one machine (docs/benchmarks), so only ratios matter. On a GPU nothing is
measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from einlinear.ops.backends import BACKENDS, CPU_BACKENDS, REGISTRY, unsupported
from einlinear.ops.context import forced
from einlinear.ops.cost_model import DENSE, costs
from einlinear.structures import Structure

# Weights that a core keeps in its cache from one tile of tokens to the next: a megabyte of float32. The compiled kernel
# takes larger tiles above the same number (HEAVY_ENTRIES in cpu/program.h); the fit presumes it.
CACHED = 2**18
# MACs that the compiled kernel does while a number is written and read again (docs/benchmarks/cpu)
CHEAP = 100


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why.

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
        why = unsupported(backend, structure, dtype, device)
        if why is not None:
            raise RuntimeError(f"einlinear.backend({backend!r}) forces a backend that cannot run here: {why}")
        return Choice(backend, "forced by einlinear.backend")
    choice = _cheapest(structure, max(tokens - 1, 0).bit_length(), dtype, device.type, training)
    # with a routing the reference would multiply every token with every expert
    if routed and choice.backend == "reference" and unsupported("batched", structure, dtype, device) is None:
        return Choice("batched", "one expert after the other, for which the reference has no means")
    return choice


@lru_cache(maxsize=65536)
def _cheapest(structure: Structure, tokens_log2: int, dtype: torch.dtype, device_type: str, training: bool) -> Choice:
    """Return the choice that nothing forces; on the CPU by the cost model, which was fitted to float32."""
    device, tokens = torch.device(device_type), 2**tokens_log2
    reasons = {name: unsupported(name, structure, dtype, device) for name in BACKENDS}
    refusals = {name: why for name, why in reasons.items() if why is not None}
    if not dtype.is_floating_point:
        return Choice("reference", "the others compute with real numbers", (), tuple(refusals.items()))
    if device_type != "cpu":
        refusals.setdefault("triton", "it has not been measured on a GPU yet: einlinear.backend('triton') takes it")
        reason = "strided matmuls of torch, which run on every device"
        return Choice("batched", reason, (), tuple(refusals.items()))
    if dtype not in (torch.float32, torch.float64):
        best, reason = "reference", "strided matmuls of half precision are slow on the CPU"
        if "cpu" not in refusals:
            best, reason = "cpu", "it computes in float32, which processors without bfloat16 arithmetic are fastest at"
        return Choice(best, reason, (), tuple(refusals.items()))
    if "cpu" not in refusals:
        refusals["batched"] = "it stands in for the compiled kernel where that cannot run"
        if training and not _is_light(structure, tokens):
            refusals["reference"] = "it may keep more for backward than nn.Linear does"
    mode = "train" if training else "forward"
    candidates = [name for name in CPU_BACKENDS if name not in refusals]
    times = {name: _microseconds(name, structure, tokens, mode) for name in (DENSE, *candidates)}
    best = min(candidates, key=times.__getitem__)
    step = "a training step" if training else "a forward pass"
    reason = f"the cheapest that can run, by the cost model with {costs().source}, for {step} of {tokens} tokens"
    if times[DENSE] < times[best]:
        reason += "; a dense layer would be faster"
    estimates = sorted(times.items(), key=lambda item: item[1])
    return Choice(best, reason, tuple(estimates), tuple(refusals.items()))


def _is_light(structure: Structure, tokens: int) -> bool:
    # then the peak memory of a training step stays below that of nn.Linear even where activations are copied, as the
    # reference does (docs/benchmarks/cpu)
    return _activations(structure, tokens) < 1.5 * (structure.in_features * structure.out_features - structure.params)


def _activations(structure: Structure, tokens: int) -> int:
    return tokens * (structure.in_features + sum(factor.result_size for factor in structure.factors))


def _microseconds(backend: str, structure: Structure, tokens: int, mode: str) -> float:
    coefficients = costs().coefficients[mode][backend]
    return sum(c * amount for c, amount in zip(coefficients, amounts(backend, structure, tokens), strict=True))


def amounts(backend: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """Return what the coefficients of a backend, or of DENSE, multiply.

    Calls, steps, and millions of MACs, activations moved, weights read, and weights read for every tile of tokens.
    """
    in_features, out_features = structure.in_features, structure.out_features
    if backend == DENSE:
        weights = in_features * out_features
        return 1, 1, tokens * weights / 1e6, tokens * (in_features + out_features) / 1e6, weights / 1e6, 0
    moved = _activations(structure, tokens) / 1e6
    spilled = tokens * max(structure.params - CACHED, 0) / 1e6
    return 1, len(structure.factors), tokens * structure.macs / 1e6, moved, structure.params / 1e6, spilled


def recomputes(backend: str, structure: Structure) -> bool:
    """Return whether a backward pass recomputes the intermediates between factors, rather than find them saved."""
    recompute = forced().recompute
    if recompute is not None:
        return recompute
    return REGISTRY[backend].recomputes and _is_cheap_to_recompute(structure)


@lru_cache(maxsize=4096)
def _is_cheap_to_recompute(structure: Structure) -> bool:
    macs = sum(factor.macs for term in structure.terms for factor in term.factors[:-1])
    return macs < CHEAP * sum(term.intermediate_size for term in structure.terms)


def forget() -> None:
    """Forget all cached choices, because the costs have changed, or which backends can run."""
    costs.cache_clear()
    _cheapest.cache_clear()
