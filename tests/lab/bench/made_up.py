"""Measurements that nobody made."""

from __future__ import annotations

from einlinear_lab.bench.cases import Case, estimate_traffic
from einlinear_lab.bench.results import BenchResult, Measurement
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import COPYING, DENSE, OURS


def spread(value: float) -> Spread:
    return Spread(value, 0.95 * value, 1.05 * value)


def made_up(case: Case, peaks: dict[str, int] | None = None, **seconds: float) -> BenchResult:
    """A result with these times of variants, nn.Linear (which takes a second) and another baseline among them."""
    times = {DENSE: 1.0, OURS if case.is_block else COPYING: 0.5}
    times |= {name.replace("_", "."): time for name, time in seconds.items()}
    measurements = [
        Measurement(
            name,
            seconds=spread(time),
            runs=9,
            speedup=spread(times[DENSE] / time) if name != DENSE else None,
            over_copying=spread(times[COPYING] / time) if name != COPYING and not case.is_block else None,
            over_layers=spread(times[OURS] / time) if name != OURS and case.is_block else None,
            peak_bytes=(peaks or {}).get(name),
        )
        for name, time in times.items()
    ]
    structures, backend = case.build(), "fused" if case.is_block else "cpu"
    macs = sum(structure.macs for structure in structures)
    return BenchResult(case, macs, backend, estimate_traffic(case, *structures), 0.01, tuple(measurements))
