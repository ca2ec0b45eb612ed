"""Which learning rate is best at every size, and how far the best one moves with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from einlinear_lab.findings.summary import Curve, Row, Study, value
from einlinear_lab.runs.records import Record
from einlinear_lab.scaling.multipliers import Bound, Multiplier

RATES = 3  # so many make a landscape

Point = tuple[float, float | None]  # (learning rate, loss); None where it diverged


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one model.

    The optimum of the means need not lie between those of the single seeds. Each parabola goes through the lowest point
    of its own curve and the two beside it, and where the loss hardly changes with the learning rate, the curves have
    their lowest points at different ones. So the range shows how well the runs tell the optimum; it is not an interval
    around `lr`.

    Attributes:
        lr: the best one by the mean loss over the seeds.
        smallest, largest: the range of those that are best by the losses of single seeds.
        bound: "<" or ">" where the loss is lowest at the smallest or at the largest learning rate that was tried: the
            true optimum is that or beyond.
    """

    lr: float
    smallest: float
    largest: float
    bound: Bound


@dataclass(frozen=True)
class Landscape:
    """One model at several learning rates.

    Attributes:
        size: "width 64".
        width: of the model.
        rows: by learning rate.
        optimum: None where every run diverged.
    """

    size: str
    width: int
    rows: tuple[Row, ...]
    optimum: Optimum | None


def landscapes(study: Study, curve: Curve, measure: str) -> list[Landscape]:
    """The landscapes, by size, of those models of a curve that were trained at three learning rates or more."""
    groups: dict[str, list[Row]] = {}
    for row in curve.rows:
        groups.setdefault(study.size(row.run), []).append(row)
    return [
        Landscape(size, rows[0].run.model.width, tuple(rows), _optimum_of(rows, measure))
        for size, rows in groups.items()
        if len(rows) >= RATES
    ]


def largest_over_smallest(found: Sequence[Landscape]) -> Multiplier | None:
    """How many times the smallest optimum the largest one is; None where there are fewer than two, or nobody can tell.

    Where an optimum is at an end of the learning rates that were tried, this is a lower bound, if it is one at all: if
    the largest optimum may be smaller, or the smallest one larger, than what was tried, the runs do not tell.
    """
    optima = sorted((landscape.optimum for landscape in found if landscape.optimum), key=lambda optimum: optimum.lr)
    if len(optima) < 2:
        return None
    smallest, largest = optima[0], optima[-1]
    if smallest.bound == ">" or largest.bound == "<":
        return None
    return Multiplier(largest.lr / smallest.lr, ">" if any(own.bound for own in optima) else "")


def best_lr(points: Sequence[Point]) -> tuple[float, Bound] | None:
    """The learning rate of the lowest loss, with a bound where it is at an end of those tried; None if all diverged.

    It is the vertex of the parabola through the lowest point and its two neighbours, in the logarithm of the learning
    rate; or the lowest point itself, where it is at an end or beside a learning rate that diverges.

    >>> lr, _ = best_lr([(0.001, 2.0), (0.01, 1.0), (0.1, 2.0)])
    >>> round(lr, 6)
    0.01
    >>> best_lr([(0.001, 1.0), (0.01, 2.0), (0.1, None)])
    (0.001, '<')
    """
    points = sorted(points)
    losses = [math.inf if loss is None else loss for _, loss in points]
    i = int(np.argmin(losses))
    if not points or losses[i] == math.inf:
        return None
    if i in (0, len(points) - 1):
        return points[i][0], "<" if i == 0 else ">"
    around = slice(i - 1, i + 2)
    if math.inf in losses[around]:
        return points[i][0], ""
    x = np.log([lr for lr, _ in points[around]])
    curvature, slope, _ = np.polyfit(x - x[1], losses[around], 2)
    return (float(np.exp(x[1] - slope / (2 * curvature))) if curvature > 0 else points[i][0]), ""


def _optimum_of(rows: Sequence[Row], measure: str) -> Optimum | None:
    """The optimum of the means, and its range. Where one seed diverges, the learning rate counts as diverging."""
    means = [(row.run.training.lr, None if row.diverged else fmean(row.values(measure))) for row in rows]
    found = best_lr(means)
    if found is None:
        return None
    seeds: dict[int, list[Record]] = {}
    for record in (record for row in rows for record in row.records):
        seeds.setdefault(record.run.seed, []).append(record)
    curves = [[(own.run.training.lr, value(own, measure)) for own in records] for records in seeds.values()]
    single = [best[0] for points in curves if len(points) == len(rows) and (best := best_lr(points))]
    lr, bound = found
    return Optimum(lr, min(single, default=lr), max(single, default=lr), bound)
