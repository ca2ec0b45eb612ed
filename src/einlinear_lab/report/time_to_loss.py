"""Training time to a target loss: the fastest model of every structure, in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from markupsafe import Markup

from einlinear_lab.models.config import DENSE
from einlinear_lab.report.comparison import Comparison, Curve, SeedGroup, metric_title, result_of
from einlinear_lab.report.page import Cell, Section, SortableTable
from einlinear_lab.runs.records import METRICS, Record
from einlinear_lab.training import metrics

# (seconds of training, loss)
Point = tuple[float, float]


@dataclass(frozen=True)
class TimeToLoss:
    """The fastest model of a curve to a target loss, and its mean time without data loading and evaluations."""

    group: SeedGroup
    seconds: float

    @property
    def inputs_per_second(self) -> float | None:
        """The training throughput in images, tokens or vectors per second."""
        seconds = self.group.step_seconds
        return self.group.result.inputs / seconds if seconds else None


def fastest(curve: Curve, metric: str, target: float) -> TimeToLoss | None:
    """Return the fastest model of a curve to a target; None where no model reaches it with all seeds."""
    candidates = []
    for group in curve.best:
        times = [seconds_to(losses_over_time(record, metric), target) for record in group.good]
        reached = [seconds for seconds in times if seconds is not None]
        if reached and len(reached) == len(group.records):
            candidates.append(TimeToLoss(group, fmean(reached)))
    return min(candidates, key=lambda time: time.seconds, default=None)


def target_losses(comparison: Comparison, count: int = 5) -> list[float]:
    """Return target losses, evenly spaced in log: from an early loss of all curves to the lowest that two reach.

    The list is empty if runs were not evaluated during training.
    """
    lowest, early = [], []
    for curve in comparison.curves:
        runs = [losses_over_time(record, comparison.error) for group in curve.best for record in group.good]
        runs = [points for points in runs if len(points) > 1]
        if runs:
            lowest.append(min(loss for points in runs for _, loss in points))
            early.append(min(points[0][1] for points in runs))
    if len(lowest) < 2 or not 0 < sorted(lowest)[1] < min(early):
        return []
    return [float(loss) for loss in np.geomspace(min(early), sorted(lowest)[1] * 1.001, count)]


def seconds_to(points: Sequence[Point], target: float) -> float | None:
    """Return the time at which a run first reaches a loss, interpolated between evaluations; None if it never does.

    >>> seconds_to([(10.0, 3.0), (20.0, 2.0), (30.0, 1.5)], 2.5)
    15.0
    """
    for (before, high), (seconds, loss) in zip([*points[:1], *points], points, strict=False):
        if loss <= target:
            return before + (high - target) / (high - loss) * (seconds - before) if high > loss else seconds
    return None


def losses_over_time(record: Record, metric: str) -> list[Point]:
    """Return the evaluations of a run; none for a diverged run."""
    lines = metrics.read(record.folder / METRICS)
    points = [(line["training_seconds"], line[metric]) for line in lines if line.get(metric) is not None]
    return [] if result_of(record).diverged else [point for point in points if math.isfinite(point[1])]


def section(comparison: Comparison) -> Section | None:
    """Show training times, if runs were evaluated during training and two curves reach a common loss."""
    targets = target_losses(comparison)
    if not targets:
        return None
    metric, error = comparison.error, metric_title(comparison.error)
    times = {curve.name: [fastest(curve, metric, target) for target in targets] for curve in comparison.curves}
    dense = next((times[curve.name] for curve in comparison.curves if curve.structure == DENSE), [None] * len(targets))
    headings = ["structure", *(f"{error} {target:.4g}" for target in targets), f"{comparison.input}s per second"]
    rows = []
    for i, (name, to_targets) in enumerate(times.items()):
        last = next((time for time in reversed(to_targets) if time), None)
        cells = map(_cell, to_targets, dense)
        rows.append([Cell(name, name, i), *cells, Cell.of((last.inputs_per_second or None) if last else None, ",.0f")])
    note = Markup(
        "Seconds of training, without data loading and evaluations, of the fastest model of a structure; in brackets "
        "its width and the speed-up over dense. Last column: throughput of the model that reaches the lowest of these "
        "losses. Runs that shared a machine slowed each other down equally: compare times within a page only."
    )
    return Section("Training time to a target loss", tables=[SortableTable(headings, rows, note)])


def _cell(time: TimeToLoss | None, dense: TimeToLoss | None) -> Cell:
    if time is None:
        return Cell("–")
    speed_up = f", {dense.seconds / time.seconds:.2f}×" if dense else ""
    return Cell(f"{time.seconds:.3g} s (width {time.group.run.model.width}{speed_up})", time.seconds)
