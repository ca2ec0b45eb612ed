"""Projections of a large weight, beside the SVDs that they stand for: one after the other, and batched.

The weight is random, the hardest there is: all singular values count. Ways take turns, and only the truncation of the
matrices differs between them. Published projections take the SVD of matrices as they lie in the weight, out × in (Dao
et al., arXiv 2204.00595, section 3.3, and their code). LAPACK takes about twice as long for a wide matrix as for its
transpose, so that it matters which: there is a loop over either.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from einlinear.files import write_text
from einlinear.ops import dense_weight
from einlinear.ops.projection.svd import Truncate, split_terms
from einlinear.ops.projection.truncate import by_svd, truncated
from einlinear.structures import structure
from einlinear_lab.bench.machine import Machine
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.tables import Table, number
from einlinear_lab.bench.timing import Spread, seconds, spread

SIZE = (11008, 4096)  # in, out: the down-projection of a language model of 7 billion parameters
SPECS = ("monarch(blocks=4)", "btt", "low_rank(rank=1024)")
ROUNDS = 3
FILE = "projection.json"

OURS, BATCHED = "el.Linear.from_dense", "batched SVD, in × out"
LOOP, TRANSPOSED = "loop of SVDs, out × in", "loop of SVDs, in × out"


def _transposed_loop(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rows of the matrices are inputs."""
    parts = [by_svd(matrix[None], rank) for matrix in matrices]
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def _loop(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    second, first = _transposed_loop(matrices.mT, rank)
    return first.mT, second.mT


WAYS: dict[str, Truncate] = {OURS: truncated, BATCHED: by_svd, LOOP: _loop, TRANSPOSED: _transposed_loop}


@dataclass(frozen=True)
class Result:
    """One structure: of every way the seconds, the peak memory in bytes, and the relative error that it leaves."""

    spec: str
    in_features: int
    out_features: int
    device: str
    seconds: dict[str, Spread]
    memory: dict[str, int]
    error: dict[str, float]


def measure(spec: str, size: tuple[int, int] = SIZE, device: str = "cpu", rounds: int = ROUNDS) -> Result:
    """Project a random weight in all ways, in turns.

    Raises:
        RuntimeError: ours leaves a larger error than the SVD.
    """
    s = structure(spec, *size)
    w = torch.randn(s.out_features, s.in_features, generator=torch.Generator().manual_seed(0)).to(device)
    calls: dict[str, Callable[[], list[Tensor]]] = {way: partial(split_terms, s, w, cut) for way, cut in WAYS.items()}
    error = {way: float((dense_weight(s, call()) - w).norm() / w.norm()) for way, call in calls.items()}  # and warm up
    if error[OURS] > error[BATCHED] * (1 + 1e-4):
        raise RuntimeError(f"{spec}: the error of {OURS} is {error[OURS]:.6g}, that of the SVD {error[BATCHED]:.6g}")
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, call in calls.items():
            found[way].append(seconds(call, device))
    memory = {way: peak_bytes(call, device) for way, call in calls.items()}
    return Result(spec, *size, device, {way: spread(own) for way, own in found.items()}, memory, error)


def table(results: Sequence[Result]) -> Table:
    """A row per structure and way."""
    rows = []
    for result in results:
        for way, own in result.seconds.items():
            ratio = own.median / result.seconds[OURS].median
            rows.append(
                (
                    f"{result.spec}, {result.in_features} → {result.out_features}",
                    way,
                    number(own.median),
                    number(ratio),
                    f"{result.memory[way] / 2**20:,.0f}",
                    f"{result.error[way]:.5f}",
                )
            )
    headings = ("weight", "way", "seconds", "× ours", "peak MiB", "relative error")
    return Table("Projections", headings, tuple(rows))


def write(machine: Machine, command: str, results: Sequence[Result], folder: Path) -> None:
    """projection.json, all of it, and projection.md, the table."""
    content = {"machine": dataclasses.asdict(machine), "command": command}
    write_text(
        folder / FILE, json.dumps(content | {"results": [dataclasses.asdict(r) for r in results]}, indent=1) + "\n"
    )
    parts = ["# Projections", str(machine), f"    {command}", table(results).markdown()]
    write_text(folder / "projection.md", "\n\n".join(parts) + "\n")
