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
Clock = Callable[[], float]

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


def seconds(call: Call, device: str, clock: Clock = time.perf_counter) -> float:
    """Return the time of one call: on the CPU by a clock, on a GPU by its own clock with cold caches."""
    if device != "cuda":
        begin = clock()
        call()
        return clock() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flushed().zero_()
    # a millisecond for the CPU to get ahead, so that launches cost no time
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def medians(calls: Mapping[str, Call], device: str, rounds: int) -> dict[str, float]:
    """Warm calls up twice, time them in interleaved rounds, and return the median seconds of each."""
    for call in (*calls.values(), *calls.values()):
        call()
    return {name: statistics.median(times) for name, times in interleave(calls, device, rounds=rounds).items()}


@cache
def _flushed() -> Tensor:
    """Return a tensor larger than the cache of any GPU: writing it evicts everything else."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def interleave(
    calls: Mapping[str, Call],
    device: str,
    budget: float = 0.0,
    prepare: Callable[[str], object] | None = None,
    *,
    rounds: int | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time warmed-up calls in rounds of random order, so that others use the caches; return seconds, round by round.

    Args:
        calls: by name.
        device: "cpu" or "cuda".
        budget: seconds for all rounds, of which there are at least five.
        prepare: called with the name of each call before it, not timed.
        rounds: number of rounds, in place of a budget.
        clock: of calls on a CPU, such as `time.process_time`.
    """

    def is_done(elapsed: float) -> bool:
        done = len(times[names[0]])
        if rounds is not None:
            return done >= rounds
        return elapsed >= budget and (done >= MIN_RUNS or elapsed >= PATIENCE)

    names, shuffler = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        elapsed = 0.0
        while not is_done(elapsed):
            shuffler.shuffle(names)
            for name in names:
                if prepare:
                    prepare(name)
                times[name].append(seconds(calls[name], device, clock))
            elapsed = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return times
