"""What the runs of a comparison say, as numbers: one row per structure and width, one curve per structure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from einlinear.experiments.config import DENSE
from einlinear.experiments.fit import Multiplier, PowerLaw, Spread, compute_multiplier, fit_power_law, spread
from einlinear.experiments.train import Result


@dataclass(frozen=True)
class Row:
    """One structure at one width. The means are over the seeds that did not diverge; None where all did.

    Attributes:
        structure, width, params, macs: of the model.
        train_loss, test_accuracy: means.
        train_losses, test_accuracies: of the seeds that they are over.
        step_seconds: median over the seeds.
        multiplier: compute multiplier against dense of the same seeds; of dense itself, 1.
        seeds, diverged: how many runs there are, and how many of them diverged.
    """

    structure: str
    width: int
    params: int
    macs: int
    train_losses: tuple[float, ...]
    test_accuracies: tuple[float, ...]
    step_seconds: float
    multiplier: Spread | None
    seeds: int
    diverged: int

    @property
    def train_loss(self) -> float | None:
        return fmean(self.train_losses) if self.train_losses else None

    @property
    def test_accuracy(self) -> float | None:
        return fmean(self.test_accuracies) if self.test_accuracies else None

    @property
    def seed_count(self) -> str:
        """How many seeds the means are over: "3", or "2 of 3" where one diverged."""
        return f"{self.seeds - self.diverged} of {self.seeds}" if self.diverged else str(self.seeds)


@dataclass(frozen=True)
class Curve:
    """One structure over all its widths: the rows by MACs, and the power law through all seeds' training losses."""

    structure: str
    rows: tuple[Row, ...]
    law: PowerLaw | None


def summarise(results: Sequence[Result], order: Iterable[str] = ()) -> list[Curve]:
    """One curve per structure, in the given order; structures it does not name follow."""
    found = dict.fromkeys(result.structure for result in results)
    names = [name for name in order if name in found]
    names += [name for name in found if name not in names]
    curves = []
    for name in names:
        own = [result for result in results if result.structure == name]
        widths = sorted({(result.macs, result.width) for result in own})
        rows = tuple(_row([result for result in own if result.width == width], results) for _, width in widths)
        points = [(result.macs, result.train_loss) for result in own if result.train_loss is not None]
        curves.append(Curve(name, rows, fit_power_law(points)))
    return curves


def _row(runs: Sequence[Result], results: Sequence[Result]) -> Row:
    """The row of one structure and width, whose runs differ by their seed."""
    good = [run for run in runs if not run.diverged]
    return Row(
        structure=runs[0].structure,
        width=runs[0].width,
        params=runs[0].params,
        macs=runs[0].macs,
        train_losses=tuple(run.train_loss for run in good if run.train_loss is not None),
        test_accuracies=tuple(run.test_accuracy for run in good if run.test_accuracy is not None),
        step_seconds=median(run.step_seconds for run in runs),
        multiplier=_multiplier(good, results),
        seeds=len(runs),
        diverged=len(runs) - len(good),
    )


def _multiplier(runs: Sequence[Result], results: Sequence[Result]) -> Spread | None:
    """Every run against the dense runs of its own seed, which saw the same batches."""
    if runs and runs[0].structure == DENSE:  # also where its curve has a bump and a cheaper model reached this loss
        return spread([Multiplier(1.0)] * len(runs))
    found = []
    for run in runs:
        dense = [
            (other.macs, other.train_loss)
            for other in results
            if other.structure == DENSE and other.seed == run.seed and other.train_loss is not None
        ]
        if dense and run.train_loss is not None:
            found.append(compute_multiplier(dense, run.macs, run.train_loss))
    return spread(found)
