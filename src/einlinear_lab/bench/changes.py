"""Changes between two benchmarks, of times relative to nn.Linear: this cancels the state of the machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from einlinear_lab.bench.cases import Case
from einlinear_lab.bench.results import Bench, BenchResult
from einlinear_lab.bench.timing import Spread


@dataclass(frozen=True)
class Change:
    """The speed-ups over nn.Linear of one variant of a case in both benchmarks."""

    case: Case
    name: str
    before: Spread
    now: Spread

    @property
    def ratio(self) -> float:
        """The new speed-up over the old: above 1 if faster than before."""
        return self.now.median / self.before.median

    @property
    def beyond_spread(self) -> bool:
        """Whether the ranges between the quartiles do not overlap."""
        return self.before.apart(self.now)


def compare(before: Bench, now: Iterable[BenchResult]) -> list[Change]:
    """Return the changes of all variants that both benchmarks measured, in the order of the second."""
    old = {(r.case, m.name): m.speedup for r in before.results for m in r.measurements}
    return [
        Change(result.case, measurement.name, past, measurement.speedup)
        for result in now
        for measurement in result.measurements
        if measurement.speedup and (past := old.get((result.case, measurement.name)))
    ]
