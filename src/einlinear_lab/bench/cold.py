"""Cold weights: in a model each layer's weights come from memory, while those of one repeated call stay in the caches.

A stack holds more copies of a layer's weights than fit into the caches, and every call takes the next copy. Plain reads
of as many bytes, in the same rounds, say what the memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from einlinear_lab.bench.timing import Call, interleave
from einlinear_lab.bench.variants import OURS, Variant

# bytes of a stack, unless four times the largest cache is more
LEAST = 200_000_000
# the largest part of the available memory for all stacks of a case
_SHARE = 0.5
# bytes to which torch aligns memory
_ALIGNMENT = 64
# plain reads of a stack, of which each takes one piece: much longer than the start of a read
_PIECES = 32
_READ = "plain read"


@dataclass(frozen=True)
class ColdTimes:
    """Seconds of all calls, round by round, those of reading a piece of a stack, and the bytes of both."""

    seconds: dict[str, list[float]]
    reads: list[float]
    piece_bytes: int
    stack_bytes: int


class Stack:
    """Copies of some weights, in one piece of memory of at least so many bytes and at least two copies."""

    def __init__(self, weights: Sequence[Tensor], least: int) -> None:
        size = weights[0].itemsize
        self._weights, self._layer, unit = weights, 0, _ALIGNMENT // size
        widths = [-(-w.numel() // unit) * unit for w in weights]
        self._layers = max(2, math.ceil(least / (size * sum(widths))))
        row = weights[0].new_zeros(sum(widths))
        for part, w in zip(row.split(widths), weights, strict=True):
            part[: w.numel()] = w.detach().flatten()
        self.memory = row.repeat(self._layers, 1)
        self._parts = self.memory.split(widths, dim=1)

    def advance(self) -> None:
        """Let the weights have the next copy as their memory."""
        self._layer = (self._layer + 1) % self._layers
        for part, w in zip(self._parts, self._weights, strict=True):
            w.data = part[self._layer, : w.numel()].view(w.shape)


def interleave_cold(calls: Mapping[str, Call], variants: Sequence[Variant], budget: float) -> ColdTimes:
    """Time the calls of all variants as `interleave` does, with cold weights, and plain reads."""
    by_weights = {tuple(map(id, variant.weights)): variant.weights for variant in variants}
    available = int(_SHARE * _available_bytes() / (len(by_weights) + 1))
    least = min(max(LEAST, 4 * _cache_bytes()), available)
    shared = {key: Stack(weights, least) for key, weights in by_weights.items()}
    stacks = {variant.name: shared[tuple(map(id, variant.weights))] for variant in variants}
    # a copy, because a piece that was read is no longer cold
    unread = stacks[OURS if OURS in stacks else variants[0].name].memory.clone().view(torch.float32).flatten()
    pieces = unread[: unread.numel() // _PIECES * _PIECES].chunk(_PIECES)
    upcoming = cycle(pieces)
    piece = pieces[0]

    def prepare(name: str) -> None:
        nonlocal piece
        if name == _READ:
            piece = next(upcoming)
        else:
            stacks[name].advance()

    seconds = interleave({**calls, _READ: lambda: piece.sum()}, "cpu", budget, prepare)
    return ColdTimes(seconds, seconds.pop(_READ), piece.nbytes, unread.nbytes)


def _cache_bytes() -> int:
    """Return the size of the largest cache of the first core, or 0 where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _available_bytes() -> int:
    """Return the bytes of memory that are free or can be freed; without a limit where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((2**10 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**60)
