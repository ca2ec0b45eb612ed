"""Timing: one call, and many calls in interleaved rounds, so that noise affects all of them equally."""

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

# the least number of runs of each call, unless all calls together take longer than so many seconds
MIN_RUNS = 5
PATIENCE = 20.0


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def apart(self, other: Spread) -> bool:
        """Return whether the ranges between the quartiles do not overlap."""
        return self.low > other.high or other.low > self.high


def spread(values: Sequence[float]) -> Spread:
    """Return the median of some values with their quartiles.

    >>> spread([5.0, 1.0, 2.0, 3.0, 4.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def seconds(call: Call, device: str) -> float:
    """Return the time of one call: on the CPU by the wall clock, on a GPU by its own clock with cold caches."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flushed().zero_()
    # a millisecond for the CPU to get ahead, so that launches cost no time
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@cache
def _flushed() -> Tensor:
    """Return a tensor larger than the cache of any GPU: writing it evicts everything else."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def interleave(
    calls: Mapping[str, Call], device: str, budget: float, prepare: Callable[[str], object] | None = None
) -> dict[str, list[float]]:
    """Time warmed-up calls in rounds of random order, so that others use the caches; return seconds, round by round.

    If given, `prepare` is called with the name of each call before it, which is not timed.
    """
    names, shuffler = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        elapsed = 0.0
        while elapsed < budget or (len(times[names[0]]) < MIN_RUNS and elapsed < PATIENCE):
            shuffler.shuffle(names)
            for name in names:
                if prepare:
                    prepare(name)
                times[name].append(seconds(calls[name], device))
            elapsed = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return times
