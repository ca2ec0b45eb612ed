"""Speed of structured layers beside the dense ones that they replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.nn import Linear
from einlinear.nn.dense_layers import features

MANY_TOKENS = 256


@dataclass(frozen=True)
class SpeedUp:
    """Speed of a new layer over that of an old one, for one token and for 256 at once."""

    one_token: float = 1.0
    many_tokens: float = 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the new layer is slower in either case, by more than timings may be off."""
        return min(self.one_token, self.many_tokens) < 0.95

    @property
    def rounded(self) -> tuple[str, str]:

        return f"{self.one_token:.2f}", f"{self.many_tokens:.2f}"


class LayerTimer:
    """Speed-ups of structured layers, timed once for each structure, size and dtype."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._speed_ups: dict[tuple[object, ...], SpeedUp] = {}

    def __call__(self, old: Any, new: Any) -> SpeedUp:
        key = (
            new.structure.spec if isinstance(new, Linear) else "dense",
            getattr(new, "precision", ""),
            *features(new),
            *features(old),
            old.weight.dtype,
            old.weight.device,
            old.bias is None,
        )
        if key not in self._speed_ups:
            self._progress(len(self._speed_ups))
            self._speed_ups[key] = speed_up(old, new)
        return self._speed_ups[key]


@torch.no_grad()
def speed_up(old: nn.Module, new: nn.Module) -> SpeedUp:
    """Time the forward passes of two linear layers with the same device and dtype; the new one may be narrower."""
    like: Any = old.weight
    x, z = (
        torch.randn(MANY_TOKENS, features(layer)[0], generator=torch.Generator().manual_seed(0)).to(like)
        for layer in (old, new if hasattr(new, "weight") else old)
    )
    return SpeedUp(*(_ratio(partial(old, x[:n]), partial(new, z[:n]), like.device) for n in (1, MANY_TOKENS)))


def _ratio(old: Callable[[], object], new: Callable[[], object], device: torch.device) -> float:
    """Call both in turns, 6 to 60 times, until 0.1 seconds have passed, and compare the fastest calls."""
    seconds: dict[Callable[[], object], list[float]] = {old: [], new: []}
    while len(seconds[old]) < 6 or (len(seconds[old]) < 60 and sum(map(sum, seconds.values())) < 0.1):
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
