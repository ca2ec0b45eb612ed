"""Measurements that nobody made."""

from __future__ import annotations

from einlinear_lab.bench.cases import Case, estimate_traffic
from einlinear_lab.bench.results import BenchResult, Measurement
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import COPYING, DENSE


def spread(value: float) -> Spread:
    return Spread(value, 0.95 * value, 1.05 * value)


def made_up(case: Case, peaks: dict[str, int] | None = None, **seconds: float) -> BenchResult:
    """A result with these times of variants, nn.Linear (which takes a second) and the copying baseline among them."""
    times = {DENSE: 1.0, COPYING: 0.5} | {name.replace("_", "."): time for name, time in seconds.items()}
    measurements = [
        Measurement(
            name,
            seconds=spread(time),
            runs=9,
            speedup=spread(times[DENSE] / time) if name != DENSE else None,
            over_copying=spread(times[COPYING] / time) if name != COPYING else None,
            peak_bytes=(peaks or {}).get(name),
        )
        for name, time in times.items()
    ]
    structure = case.build()
    return BenchResult(case, structure.macs, "cpu", estimate_traffic(case, structure), 0.01, tuple(measurements))
