"""The clock: how long one call takes, and many calls in turns, so that noise hits all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Call = Callable[[], object]

LEAST = 5  # runs of each call


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def apart(self, other: Spread) -> bool:
        """Whether the two ranges between the quartiles have nothing in common."""
        return self.low > other.high or other.low > self.high


def spread(values: Sequence[float]) -> Spread:
    """The median of some values, with their quartiles.

    >>> spread([5.0, 1.0, 2.0, 3.0, 4.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def seconds(call: Call, device: str) -> float:
    """How long one call takes: on the CPU by the wall clock, on a GPU by its own, with its caches cold."""
    if device == "cuda":
        return _cuda_seconds(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], device: str, budget: float) -> dict[str, list[float]]:
    """Time all calls in rounds, each of them once per round, in an order that changes from round to round.

    One call at a time leaves the caches to the others in between, as the layers of a model do.

    Args:
        calls: by name; warm already, which the check of their results leaves them.
        device: that they run on.
        budget: seconds after which no further round begins, once every call has been run `LEAST` times.

    Returns:
        The seconds of every call, round by round.
    """
    names = list(calls)
    shuffler = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(found[names[0]]) < LEAST or time.perf_counter() - start < budget:
            shuffler.shuffle(names)
            for name in names:
                found[name].append(seconds(calls[name], device))
    finally:
        if collecting:
            gc.enable()
    return found


def _cuda_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flushed().zero_()
    torch.cuda._sleep(2_000_000)  # a millisecond, in which the CPU gets ahead: launches cost no time then
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@cache
def _flushed() -> Tensor:
    """Larger than the cache of any GPU: writing it evicts all else."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")
