"""What changed between two runs: times relative to nn.Linear, so that the machine's mood cancels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from einlinear_lab.bench.cases import Case
from einlinear_lab.bench.results import Bench, Result
from einlinear_lab.bench.timing import Spread


@dataclass(frozen=True)
class Change:
    """One variant of one case in both runs: its speed-up over nn.Linear."""

    case: Case
    name: str
    before: Spread
    now: Spread

    @property
    def ratio(self) -> float:
        """Above 1: faster than before."""
        return self.now.median / self.before.median

    @property
    def beyond_spread(self) -> bool:
        """Whether the ranges between the quartiles have nothing in common."""
        return self.before.apart(self.now)


def changes(before: Bench, now: Iterable[Result]) -> list[Change]:
    """All variants that both runs measured, in the order of the latter."""
    old = {(r.case, m.name): m.speedup for r in before.results for m in r.measurements}
    found = []
    for result in now:
        for measurement in result.measurements:
            past = old.get((result.case, measurement.name))
            if past and measurement.speedup:
                found.append(Change(result.case, measurement.name, past, measurement.speedup))
    return found
