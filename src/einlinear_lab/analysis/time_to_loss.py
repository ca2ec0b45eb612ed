"""Time to a loss: the frontier of every structure over seconds, and how many times longer dense needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from einlinear_lab.analysis.comparison import Comparison, Curve, SeedGroup, dense_of, logged
from einlinear_lab.runs.records import Record

# columns of the table
_TARGETS = 5


# points of a frontier
_POINTS = 24


Cost = Literal["seconds", "macs"]


class Evaluation(NamedTuple):
    """The seconds and the MACs of training so far, and the loss."""

    seconds: float
    macs: float
    loss: float


@dataclass(frozen=True)
class TimedModel:
    """A model at its best learning rate, and the runs of it that were evaluated during training."""

    group: SeedGroup
    runs: tuple[tuple[Record, tuple[Evaluation, ...]], ...]

    @property
    def first(self) -> float:
        """The lowest loss of a first evaluation."""
        return min(run[0].loss for _, run in self.runs)

    @property
    def lowest(self) -> float:
        """The lowest loss that all seeds reach; infinite where one of them diverged."""
        losses = [min(evaluation.loss for evaluation in run) for _, run in self.runs]
        return max(losses) if len(losses) == len(self.group.records) else math.inf

    def to(self, target: float, cost: Cost) -> float | None:
        """Return the mean cost over the seeds to reach a loss; None unless all seeds reach it."""
        costs = [cost_to([(getattr(e, cost), e.loss) for e in run], target) for _, run in self.runs]
        reached = [value for value in costs if value is not None]
        return fmean(reached) if reached and len(reached) == len(self.group.records) else None


@dataclass(frozen=True)
class TimeFrontier:
    """The lower envelope of all models of a curve: the least cost at which one of them reaches a loss."""

    curve: Curve
    models: tuple[TimedModel, ...]

    @property
    def first(self) -> float:
        """The lowest loss of a first evaluation: the cost of a higher loss was not measured."""
        return min(model.first for model in self.models)

    @property
    def lowest(self) -> float:
        """The lowest loss that a model reaches with all of its seeds; infinite where none does."""
        return min(model.lowest for model in self.models)

    def to(self, target: float, cost: Cost = "seconds") -> tuple[float, SeedGroup] | None:
        """Return the least cost of a loss, and the model; None where no model reaches the loss with all seeds."""
        costs = [(value, model.group) for model in self.models if (value := model.to(target, cost)) is not None]
        return min(costs, key=lambda pair: pair[0], default=None)

    def points(self) -> list[tuple[float, float, SeedGroup]]:
        """Return points of the envelope: seconds, loss and the model."""
        envelope = [(self.to(loss), loss) for loss in _losses(self.first, self.lowest, _POINTS)]
        return [(found[0], loss, found[1]) for found, loss in envelope if found]


@dataclass(frozen=True)
class MultiplierAtLoss:
    """How many times the seconds and the MACs of training the dense frontier needs for a loss."""

    loss: float
    time: float
    compute: float


def frontiers_of(comparison: Comparison) -> list[TimeFrontier]:
    """Return the frontiers of the curves whose runs were evaluated during training."""
    frontiers = []
    for curve in comparison.curves:
        models = tuple(model for group in curve.best if (model := _timed_model(group, comparison.metric)).runs)
        if models:
            frontiers.append(TimeFrontier(curve, models))
    return frontiers


def with_dense(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> list[tuple[TimeFrontier, TimeFrontier]]:
    """Return every frontier with that of its dense curve, except those of dense curves themselves."""
    by_name = {frontier.curve.name: frontier for frontier in frontiers}
    pairs = []
    for frontier in frontiers:
        dense = dense_of(frontier.curve, comparison.curves)
        if dense and dense is not frontier.curve and dense.name in by_name:
            pairs.append((frontier, by_name[dense.name]))
    return pairs


def target_losses(frontiers: Sequence[TimeFrontier]) -> list[float]:
    """Return losses, even in log: from the highest that all frontiers measured to the lowest that two reach."""
    lowest = sorted(frontier.lowest for frontier in frontiers)
    if len(lowest) < 2:
        return []
    return _losses(min(frontier.first for frontier in frontiers), lowest[1], _TARGETS)


def multipliers_over(frontier: TimeFrontier, dense: TimeFrontier) -> list[MultiplierAtLoss]:
    """Return multipliers at the losses that both frontiers measured; none without any."""
    losses = _losses(min(frontier.first, dense.first), max(frontier.lowest, dense.lowest), _POINTS)
    return [at for loss in losses if (at := multiplier_at(frontier, dense, loss))]


def multiplier_at(frontier: TimeFrontier, dense: TimeFrontier, loss: float) -> MultiplierAtLoss | None:
    """Return the multipliers at a loss; None where one of the frontiers does not reach it."""
    ratios = []
    for cost in ("seconds", "macs"):
        ours, theirs = frontier.to(loss, cost), dense.to(loss, cost)
        if ours is None or theirs is None:
            return None
        ratios.append(theirs[0] / ours[0])
    return MultiplierAtLoss(loss, *ratios)


def cost_to(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the cost at which a run first reaches a loss, interpolated between evaluations; None if it never does.

    >>> cost_to([(10.0, 3.0), (20.0, 2.0), (30.0, 1.5)], 2.5)
    15.0
    """
    for (before, high), (cost, loss) in zip([*points[:1], *points], points, strict=False):
        if loss <= target:
            return before + (high - target) / (high - loss) * (cost - before) if high > loss else cost
    return None


def _timed_model(group: SeedGroup, metric: str) -> TimedModel:
    """Read the evaluations of a model; a run with a single one, after the training, counts as none."""
    runs = []
    for record in group.good:
        # an error of zero has no logarithm
        points = [(step, seconds, loss) for step, seconds, loss in logged(record, metric) if loss > 0]
        run = tuple(Evaluation(seconds, group.compute_at(step), loss) for step, seconds, loss in points)
        runs += [(record, run)] if len(run) > 1 else []
    return TimedModel(group, tuple(runs))


def _losses(high: float, low: float, count: int) -> list[float]:
    """Return losses from high to just above low, even in log; none for an empty range."""
    return np.geomspace(high, 1.001 * low, count).tolist() if 0 < 1.001 * low < high else []
