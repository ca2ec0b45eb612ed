"""Speed of structured layers beside the dense ones, timed in turns so that noise hits both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.compression.selection import weight_of
from einlinear.nn import Linear
from einlinear.nn.layer_kinds import features

# tokens of a large batch
MANY = 256
# calls of each layer, and seconds of both after which no more calls are needed
_LEAST, _MOST, _ENOUGH = 6, 60, 0.1
# of the dense layer's speed, by which timings may be off
_NOISE = 0.95


@dataclass(frozen=True)
class SpeedUp:
    """Speed of a new layer over that of an old one, for one token and for `MANY` at once."""

    one_token: float = 1.0
    many_tokens: float = 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the new layer is slower in either case, by more than timings are off."""
        return min(self.one_token, self.many_tokens) < _NOISE


@torch.no_grad()
def speed_up(old: nn.Module, new: nn.Module) -> SpeedUp:
    """Time the forward passes of two linear layers with the same device and dtype."""
    like = next(new.parameters())
    x = torch.randn(MANY, features(old)[0], generator=torch.Generator().manual_seed(0)).to(like)
    return SpeedUp(*(_ratio(partial(old, part), partial(new, part), like.device) for part in (x[:1], x)))


class LayerTimer:
    """Speed-ups of structured layers, timed once for each structure, size and dtype.

    `progress` is called with the number of timings so far.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._speed_ups: dict[tuple[object, ...], SpeedUp] = {}

    def __call__(self, old: Any, new: Linear) -> SpeedUp:
        key = (new.structure.spec, *weight_of(old).shape, old.weight.dtype, old.weight.device, old.bias is None)
        if key not in self._speed_ups:
            self._progress(len(self._speed_ups))
            self._speed_ups[key] = speed_up(old, new)
        return self._speed_ups[key]


def _ratio(old: Callable[[], object], new: Callable[[], object], device: torch.device) -> float:
    """The shortest time of the old calls over that of the new ones."""
    seconds: dict[Callable[[], object], list[float]] = {old: [], new: []}
    while len(seconds[old]) < _LEAST or (len(seconds[old]) < _MOST and sum(map(sum, seconds.values())) < _ENOUGH):
        for run, times in seconds.items():
            times.append(seconds_of(run, device))
    return min(seconds[old]) / min(seconds[new])


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, until the device has finished it."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
