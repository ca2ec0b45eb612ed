"""Dispatch: the choice of a backend, on a CPU the cheapest by a cost model that was fitted to measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from einlinear import structures
from einlinear.ops.backends import BACKENDS, CPU_BACKENDS, REGISTRY, check_name, unsupported
from einlinear.ops.context import forced
from einlinear.ops.cost_model import DENSE, costs
from einlinear.structures import Structure

F = TypeVar("F", bound=Callable[..., object])
# weights that a core keeps in its cache from one tile of tokens to the next; the same as HEAVY_ENTRIES in cpu/program.h
CACHED = 2**18
# a feed-forward block runs fused with no fewer tokens, and no more entries of all its factors
FUSED_TOKENS, FUSED_ENTRIES = 16, 2**23
# Backward, every thread has gradients of its own of all factors, to which it adds for every tile, so a block of more
# entries than FUSED_ENTRIES_TRAINING needs many tokens. Every hidden feature costs the products that compute it again,
# in place of writing and reading it.
FUSED_ENTRIES_TRAINING, FUSED_TOKENS_TRAINING, FUSED_MACS_PER_FEATURE = 2**20, 1024, 384
# Layers of one input are stacked up to so many entries together: more leave the cache between two tiles of tokens, in
# training beside their gradients.
STACKED_ENTRIES, STACKED_ENTRIES_TRAINING = 2**19, 2**18


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
        why = unsupported(backend, structure, dtype, device)
        if why is not None:
            raise RuntimeError(f"einlinear.backend({backend!r}) forces a backend that cannot run here: {why}")
        return Choice(backend, "forced by einlinear.backend")
    choice = _cheapest(structure, max(tokens - 1, 0).bit_length(), dtype, device.type, training)
    # with a routing the reference would multiply every token with every expert
    if routed and choice.backend == "reference" and unsupported("batched", structure, dtype, device) is None:
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
    reasons = {name: unsupported(name, structure, dtype, device) for name in BACKENDS}
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
        if training and _activations(structure, tokens) >= 1.5 * saved_weights:
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


def _activations(structure: Structure, tokens: int) -> int:
    return tokens * (structure.in_features + sum(factor.result_size for factor in structure.factors))


def amounts(backend: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """Return what the coefficients of a backend, or of DENSE, multiply.

    Calls, steps, and millions of MACs, activations moved, weights read, and weights read for every tile of tokens.
    """
    if backend == DENSE:
        weights = structure.in_features * structure.out_features
        ends = tokens * (structure.in_features + structure.out_features)
        return 1, 1, tokens * weights / 1e6, ends / 1e6, weights / 1e6, 0
    moved = _activations(structure, tokens) / 1e6
    spilled = tokens * max(structure.params - CACHED, 0) / 1e6
    return 1, len(structure.factors), tokens * structure.macs / 1e6, moved, structure.params / 1e6, spilled


def recomputes(backend: str, structure: Structure) -> bool:
    """Return whether a backward pass recomputes the intermediates between factors, rather than find them saved."""
    recompute = forced().recompute
    return REGISTRY[backend].recomputes and _is_cheap_to_recompute(structure) if recompute is None else recompute


@lru_cache(maxsize=4096)
def _is_cheap_to_recompute(structure: Structure) -> bool:
    macs = sum(factor.macs for term in structure.terms for factor in term.factors[:-1])
    # the compiled kernel does 100 MACs while a number is written and read again (docs/benchmarks/cpu)
    return macs < 100 * sum(term.intermediate_size for term in structure.terms)


def reason_not_to_fuse(
    structures: Sequence[Structure],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
    backend: str | None = None,
) -> str | None:
    """Return why a feed-forward block runs one layer after the other, or None if it runs fused.

    Args:
        structures: of its layers.
        tokens, dtype, device, training: as for `choose`.
        backend: of the call; "cpu" fuses all that can be fused, as `einlinear.backend("cpu")` does. "triton", which is
            experimental and not measured on a GPU yet, fuses where it is forced.
    """
    name = backend_of_fused_blocks(backend)
    backend = backend or forced().backend
    if REGISTRY[check_name(name)].fused_blocks is None:
        return f"the backend {backend!r} is forced, which has no fused blocks"
    if backend is None:
        if tokens < FUSED_TOKENS:
            return f"fewer than {FUSED_TOKENS} tokens are faster layer by layer"
        entries = sum([structure.params for structure in structures])
        if entries > FUSED_ENTRIES:
            return f"its factors have {entries:,} entries, but no more than {FUSED_ENTRIES:,} stay in cache together"
        if training and entries > FUSED_ENTRIES_TRAINING:
            if tokens < FUSED_TOKENS_TRAINING:
                return f"training with {entries:,} entries of factors needs {FUSED_TOKENS_TRAINING:,} tokens to pay"
            macs = sum([structure.macs for structure in structures[:-1]]) // structures[-1].in_features
            if macs > FUSED_MACS_PER_FEATURE:
                return (
                    f"a hidden feature costs {macs:,} multiply-accumulates, and its backward pass would compute it "
                    f"again, which pays up to {FUSED_MACS_PER_FEATURE}"
                )
    if training and forced().recompute is False:
        return "its backward pass computes hidden features again, but einlinear.backend(recompute=False) saves them"
    why = unsupported(name, structures[0], dtype, device)
    return None if why is None else f"the backend {name!r}, which fuses blocks, cannot run: {why}"


def backend_of_fused_blocks(backend: str | None = None) -> str:
    """Return the backend that runs feed-forward blocks if they are fused: that of a call, the forced one, or "cpu"."""
    return backend or forced().backend or "cpu"


def reason_not_to_stack(
    structure: Structure,
    layers: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
) -> str | None:
    """Return why layers of one structure and one input run one after the other, or None if they run as one product.

    One product of stacked factors saves calls and reads of the input, but the factors are copied for every call.

    Args:
        structure: of each of the layers.
        layers: their number.
        tokens, dtype, device, training: as for `choose`.
    """
    if forced().backend not in (None, "cpu"):
        return f"the backend {forced().backend!r} is forced, for which stacked layers were not measured"
    return _reason_not_to_stack(structure, layers, tokens, dtype, device, training)


@cached
def _reason_not_to_stack(
    structure: Structure, layers: int, tokens: int, dtype: torch.dtype, device: torch.device, training: bool
) -> str | None:
    # measured for 3 layers of 256 to 1024 features (benchmarks/call_overhead.py): from here on up to 1.2
    # times as fast, with fewer tokens about even or slower
    entries, saved = layers * structure.params, (layers - 1) * tokens * structure.in_features
    limit = STACKED_ENTRIES_TRAINING if training else STACKED_ENTRIES
    if entries > limit:
        return f"together their factors have {entries:,} entries, but no more than {limit:,} stay in cache"
    if 2 * entries > saved:
        return f"to copy {entries:,} entries takes longer than to read {saved:,} features of the input again"
    try:
        stacked = structures.stack(structure, layers)
    except ValueError as error:
        return str(error)
    backend = choose(stacked, tokens, dtype, device, training).backend
    return None if backend == "cpu" else f"the backend {backend!r} runs them, for which stacks were not measured"


@assume_constant_result
def choose_fused_for_compiler(
    specs: Sequence[str],
    features: Sequence[int],
    dtype: torch.dtype,
    device: str,
    backend: str | None,
) -> str | None:
    """Return the backend with which torch.compile traces a block as a single operator, or None if it traces layers.

    The layers are up, down and gate. The features are those of the input, the hidden layer and the output.
    """
    in_features, hidden_features, out_features = features
    sizes = ((in_features, hidden_features), (hidden_features, out_features), (in_features, hidden_features))
    layers = [structures.structure(spec, *size) for spec, size in zip(specs, sizes)]
    # for many tokens, as in `choose_for_compiler`
    reason = reason_not_to_fuse(layers, 2048, dtype, torch.device(device), True, backend)
    return backend_of_fused_blocks(backend) if reason is None else None


def forget() -> None:
    """Forget all cached choices, because the costs have changed, or which backends can run."""
    costs.cache_clear()
    for cache in _CACHES:
        cache.cache_clear()
