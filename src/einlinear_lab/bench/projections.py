"""Benchmark of projections of a large random weight: against the SVDs that they replace, in a loop and batched.

Published projections take SVDs of matrices in the layout of the weight, out × in (arXiv 2204.00595, section 3.3).
LAPACK takes about twice as long for a wide matrix as for its transpose, so both layouts are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from einlinear.ops import dense_weight
from einlinear.ops.projection.svd import Truncate, by_svd, split_terms, truncated
from einlinear.structures import structure
from einlinear_lab.bench.cases import DEVICES, check
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.tables import Table, number
from einlinear_lab.bench.timing import Spread, seconds, spread

# (in, out) of the down-projection of a language model of 7 billion parameters
SIZE = (11008, 4096)
SPECS = ("monarch(blocks=4)", "btt", "low_rank(rank=1024)")
ROUNDS = 3

OURS, BATCHED = "el.Linear.from_dense", "batched SVD, in × out"
LOOP, TRANSPOSED = "loop of SVDs, out × in", "loop of SVDs, in × out"


def _transposed_loop(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    parts = [by_svd(matrix[None], rank) for matrix in matrices]
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def _loop(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    second, first = _transposed_loop(matrices.mT, rank)
    return first.mT, second.mT


METHODS: dict[str, Truncate] = {OURS: truncated, BATCHED: by_svd, LOOP: _loop, TRANSPOSED: _transposed_loop}


@dataclass(frozen=True)
class ProjectionResult:
    """The time, the peak memory in bytes and the relative error of every method, for one structure."""

    spec: str
    in_features: int
    out_features: int
    device: str
    seconds: dict[str, Spread]
    memory: dict[str, int]
    error: dict[str, float]


@dataclass(frozen=True)
class ProjectionCase:
    """A structure and the size of a weight."""

    spec: str
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.spec}, {self.size[0]} → {self.size[1]}"


@dataclass(frozen=True)
class ProjectionBenchmark:
    """The benchmark of projections: the options of its grid. Raises ValueError for an unknown device."""

    FILE: ClassVar[str] = "projection.json"
    TITLE: ClassVar[str] = "Projections"

    structures: Sequence[str] = SPECS
    sizes: Sequence[tuple[int, int]] = (SIZE,)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check("device", [self.device], DEVICES)

    def cases(self) -> list[ProjectionCase]:
        return [ProjectionCase(*case) for case in product(self.structures, self.sizes)]

    def measure(self, case: ProjectionCase) -> ProjectionResult:
        return measure(case.spec, case.size, self.device)

    def tables(self, results: Sequence[ProjectionResult]) -> list[Table]:
        return tables(results)


def measure(spec: str, size: tuple[int, int] = SIZE, device: str = "cpu", rounds: int = ROUNDS) -> ProjectionResult:
    """Project a random weight by all methods. Raises RuntimeError if ours has a larger error than the SVD."""
    s = structure(spec, *size)
    w = torch.randn(s.out_features, s.in_features, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {name: partial(split_terms, s, w, truncate) for name, truncate in METHODS.items()}
    # this warms up as well
    error = {name: float((dense_weight(s, call()) - w).norm() / w.norm()) for name, call in calls.items()}
    if error[OURS] > error[BATCHED] * (1 + 1e-4):
        raise RuntimeError(f"{spec}: the error of {OURS} is {error[OURS]:.6g}, that of the SVD {error[BATCHED]:.6g}")
    times = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(rounds)]
    spreads = {name: spread([time[name] for time in times]) for name in METHODS}
    memory = {name: peak_bytes(call, device) for name, call in calls.items()}
    return ProjectionResult(spec, *size, device, spreads, memory, error)


def tables(results: Sequence[ProjectionResult]) -> list[Table]:
    rows = []
    for result in results:
        for name, time in result.seconds.items():
            case = str(ProjectionCase(result.spec, (result.in_features, result.out_features)))
            ratio, memory = time.median / result.seconds[OURS].median, f"{result.memory[name] / 2**20:,.0f}"
            rows.append((case, name, number(time.median), number(ratio), memory, f"{result.error[name]:.5f}"))
    headings = ("weight", "method", "seconds", "× el.Linear.from_dense", "peak MiB", "relative error")
    return [Table(ProjectionBenchmark.TITLE, headings, tuple(rows))]
