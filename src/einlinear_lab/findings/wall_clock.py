"""How long training takes to a loss: not MACs but seconds, which kernels and small models decide as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from einlinear_lab.findings.summary import Curve, Row, Study, result
from einlinear_lab.runs.records import METRICS, Record
from einlinear_lab.training import metrics

Point = tuple[float, float]  # (seconds of training, loss)


@dataclass(frozen=True)
class Arrival:
    """The model of a curve that is the first to reach a loss.

    Attributes:
        row: which.
        seconds: of training, without data and evaluations; the mean over its seeds.
    """

    row: Row
    seconds: float

    @property
    def inputs_per_second(self) -> float | None:
        """Images, tokens or vectors that it is trained on in a second."""
        seconds = self.row.step_seconds
        return self.row.result.inputs / seconds if seconds else None


def arrival(curve: Curve, measure: str, loss: float) -> Arrival | None:
    """The first arrival of a curve at a loss; None where of no model all seeds reach it."""
    found = []
    for row in curve.best:
        times = [seconds_to(losses_over_time(record, measure), loss) for record in row.good]
        reached = [seconds for seconds in times if seconds is not None]
        if reached and len(reached) == len(row.records):
            found.append(Arrival(row, fmean(reached)))
    return min(found, key=lambda arrival: arrival.seconds, default=None)


def losses_to_reach(study: Study, count: int = 5) -> list[float]:
    """Losses to compare times at, the highest first.

    They are evenly spread in log, from one that every curve soon has to the lowest that two of them reach. There are
    none where runs were not evaluated while they were trained.
    """
    lowest, soon = [], []
    for curve in study.curves:
        points = [losses_over_time(record, study.error) for row in curve.best for record in row.good]
        points = [own for own in points if len(own) > 1]
        if points:
            lowest.append(min(loss for own in points for _, loss in own))
            soon.append(min(own[0][1] for own in points))
    if len(lowest) < 2 or not 0 < sorted(lowest)[1] < min(soon):
        return []
    return [float(loss) for loss in np.geomspace(min(soon), sorted(lowest)[1] * 1.001, count)]


def seconds_to(points: Sequence[Point], loss: float) -> float | None:
    """When a run first reaches a loss, on straight lines between its evaluations; None where it never does.

    >>> seconds_to([(10.0, 3.0), (20.0, 2.0), (30.0, 1.5)], 2.5)
    15.0
    """
    before: Point | None = None
    for seconds, found in points:
        if found <= loss:
            if before is None or found == before[1]:
                return seconds
            share = (before[1] - loss) / (before[1] - found)
            return before[0] + share * (seconds - before[0])
        before = seconds, found
    return None


def losses_over_time(record: Record, measure: str) -> list[Point]:
    """The evaluations of a run; none where it diverged."""
    lines = metrics.read(record.folder / METRICS)
    points = [(line["training_seconds"], line[measure]) for line in lines if line.get(measure) is not None]
    return [] if result(record).diverged else [point for point in points if math.isfinite(point[1])]
