"""The protocol of the benchmarks of `einlinear bench`, other than that of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

from einlinear_lab.bench.tables import Table

C = TypeVar("C")
R = TypeVar("R")


class Benchmark(Protocol[C, R]):
    """A grid of cases, their measurement and their tables. It is a dataclass, whose fields are the options it takes.

    Attributes:
        FILE: name of the file of results.
        TITLE: of the page of results.
    """

    FILE: ClassVar[str]
    TITLE: ClassVar[str]

    def cases(self) -> Sequence[C]:
        """Return the cases, whose texts are their names."""

    def measure(self, case: C) -> R:
        """Measure a case. Raises RuntimeError if an output is wrong, or nothing runs."""

    def tables(self, results: Sequence[R]) -> list[Table]:
        """Return the results of all cases as tables."""
