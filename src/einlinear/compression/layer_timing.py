"""Speed of structured layers beside the dense ones that they replace.

In a model the weights of a layer have left the caches before its next call, unless all layers fit in. Timed layers
therefore take their weights from a stack: memory as large as all layers, of which every call takes the next piece.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.resume_cache import ResumeCache
from einlinear.nn import Linear
from einlinear.nn.dense_layers import features, is_linear
from einlinear.ops.cost_model import processor_model

# unless the user gives another number
TOKENS = (1, 256)
# a stack larger than this many times the last cache is no colder
_CACHES = 2
# where the system does not tell the size of its last cache
_USUAL_CACHE = 32 * 2**20
# bytes to which torch aligns memory
_ALIGNMENT = 64
# fewest and most rounds of calls, and the seconds of a layer's calls, all as fast as its fastest, that are enough
_FEWEST, _MOST, _SECONDS = 3, 60, 0.1
# a layer that takes so many times as long as the dense one in the fewest calls is not called again
_TOO_SLOW = 4


@dataclass(frozen=True)
class SpeedUp:
    """Speed of a new layer over that of an old one, by the number of tokens at once."""

    by_tokens: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys(TOKENS, 1.0))

    @property
    def is_slower(self) -> bool:
        """Whether the new layer is slower for any number of tokens, by more than timings may be off."""
        return min(self.by_tokens.values()) < 0.95

    @property
    def rounded(self) -> tuple[str, ...]:

        return tuple(f"{ratio:.2f}" for ratio in self.by_tokens.values())


def describe_tokens(counts: Sequence[int]) -> str:
    """Describe one number of tokens or several."""
    first, *others = counts
    return " or ".join([f"{first:,} token{'' if first == 1 else 's'}", *(f"{n:,}" for n in others)])


def narrowed_label(in_features: int, out_features: int) -> str:
    """Return the label of a dense layer with fewer features than the one that it replaces."""
    return f"dense, narrowed to {(in_features, out_features)}"


class LayerTimer:
    """Seconds of new layers beside dense ones, measured once for each label, size, dtype and number of tokens."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        tokens: Sequence[int],
        cache: ResumeCache,
        progress: Callable[[int], None],
    ) -> None:
        self.tokens, self._cache, self._progress = tuple(tokens), cache, progress
        self._stack_bytes = sum(map(_stack_bytes, layers.values()))
        self._seconds: dict[str, dict[str, float]] = {}
        self._measured = 0

    def __call__(self, old: Any, new: Any) -> SpeedUp:
        """Return the speed-up of a structured layer, or of a dense one with fewer features."""
        spec = new.structure.spec if isinstance(new, Linear) else "dense"
        spec = spec if features(new) == features(old) else narrowed_label(*features(new))
        label = ", ".join(filter(None, (spec, getattr(new, "precision", ""))))
        seconds = {n: self.seconds(old, {label: lambda: new}, n) for n in self.tokens}
        return SpeedUp({n: of["dense"] / of[label] for n, of in seconds.items()})

    def seconds(self, old: Any, new: Mapping[str, Callable[[], nn.Module]], tokens: int) -> dict[str, float]:
        """Measure new layers by label, and return the seconds of all that were measured for a size, with "dense".

        Those of new layers are ratios to the dense layer in the same rounds, times the first seconds of that one.
        """
        size = f"{self.size(old)} for {tokens} tokens"
        known = self._seconds.setdefault(size, {})
        if missing := {label: build for label, build in new.items() if label not in known}:

            def measure() -> dict[str, float]:
                layers = {"dense": old, **{label: build() for label, build in missing.items()}}
                return interleaved_seconds(layers, tokens, self._stack_bytes)

            def decode(record: Mapping[str, Any]) -> dict[str, float]:
                return {label: float(record[label]) for label in ("dense", *missing)}

            self._progress(self._measured)
            self._measured += 1
            seconds = self._cache.get_or(f"seconds of {size}: {'; '.join(missing)}", measure, decode)
            scale = known.setdefault("dense", seconds["dense"]) / seconds["dense"]
            known |= {label: scale * seconds[label] for label in missing}
        return known

    @staticmethod
    def size(old: Any) -> str:
        """Describe what the time of a dense layer depends on."""
        bias = "no bias" if old.bias is None else "bias"
        machine = f"{old.weight.device}, {torch.get_num_threads()} threads of {processor_model()}"
        return f"{type(old).__name__} {features(old)}, {bias}, {old.weight.dtype}, {machine}"


@torch.no_grad()
def interleaved_seconds(layers: Mapping[str, nn.Module], tokens: int, stack_bytes: int) -> dict[str, float]:
    """Call linear layers of one size in turns, and return the seconds of the fastest call of each.

    Weights come from a stack of at most so many bytes. The first layer is the one that the others are compared with.
    """
    layers = {label: _detached(layer) for label, layer in layers.items()}
    first, *_ = layers.values()
    device = next(_tensors(first)).device
    stack = _Stack(min(stack_bytes, _CACHES * _cache_bytes(device)), device)
    width = features(first)[0]
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    # layers of one dtype and size have one input; narrow ones have fewer features
    kinds = {label: (_in_features(layer, width), _dtype(layer)) for label, layer in layers.items()}
    inputs = {(size, dtype): x[:, :size].to(dtype) for size, dtype in kinds.values()}
    calls: dict[str, list[float]] = {label: [] for label in layers}
    reference = next(iter(calls.values()))

    def is_enough() -> bool:
        # interruptions by other programs do not count
        return sum(len(seconds) * min(seconds) for seconds in calls.values()) >= _SECONDS * len(calls)

    while len(reference) < _FEWEST or (len(reference) < _MOST and not is_enough()):
        for label, layer in layers.items():
            seconds = calls[label]
            if len(seconds) < _FEWEST or min(seconds) <= _TOO_SLOW * min(reference):
                stack.advance(layer)
                seconds.append(_seconds_of_call(layer, inputs[kinds[label]]))
    return {label: min(seconds) for label, seconds in calls.items()}


class _Stack:
    """Memory from which layers take their weights: every time the next piece, and at the end from the beginning."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        tile = torch.randint(0, 256, (2**16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        # a sign, and an exponent with which entries of all float dtypes are normal numbers, of float32 about 0.01
        tile[1::2] = tile[1::2] & 0x80 | 0x3C
        self._memory = tile.repeat(-(-nbytes // len(tile)))[:nbytes].to(device)
        self._next = 0

    def advance(self, layer: nn.Module) -> None:
        """Let a layer have the next piece as its tensors, unless it is larger than the stack."""
        size = _stack_bytes(layer)
        if size > len(self._memory):
            return
        if self._next + size > len(self._memory):
            self._next = 0
        for tensor in _tensors(layer):
            piece = self._memory[self._next : self._next + tensor.nbytes]
            tensor.data = piece.view(tensor.dtype).view(tensor.shape)
            self._next += _aligned(tensor.nbytes)


def _seconds_of_call(layer: nn.Module, x: Tensor) -> float:
    """Time one call, until the device has finished it."""
    start = time.perf_counter()
    layer(x)
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter() - start


def _detached(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer whose tensors can have other memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in layer.parameters()}
    return copy.deepcopy(layer, memo | {id(b): b.detach() for b in layer.buffers()})


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    return chain(layer.parameters(), layer.buffers())


def _in_features(layer: nn.Module, otherwise: int) -> int:
    return features(layer)[0] if isinstance(layer, Linear) or is_linear(layer) else otherwise


def _dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of the inputs; a `QuantizedLinear` without a bias has no parameters."""
    parameter = next(layer.parameters(), None)
    return layer.dtype if parameter is None else parameter.dtype  # type: ignore[return-value]


def _stack_bytes(layer: nn.Module) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in _tensors(layer))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=_USUAL_CACHE)
