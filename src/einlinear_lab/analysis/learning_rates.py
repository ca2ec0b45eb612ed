"""Learning-rate sweeps: the loss over the learning rate for every model size, and the optimal learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from einlinear_lab.analysis.comparison import (
    BATCH_SIZE,
    LENGTHS,
    SIZES,
    Comparison,
    Curve,
    SeedGroup,
    make_curves,
    metric_of,
)
from einlinear_lab.runs.run import Run
from einlinear_lab.scaling.compute_multipliers import Bound, Multiplier

# across which a learning rate should transfer
_SIZES = (*SIZES, *LENGTHS, BATCH_SIZE)
# learning rates of a sweep
MIN_RATES = 3

# (learning rate, loss); None where the run diverged
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Optimum:
    """The optimum of the mean loss over the seeds, and the range of those of single seeds, which need not contain it.

    The bound is "<" or ">" where the lowest loss is at the smallest or at the largest learning rate of the sweep.
    """

    lr: float
    smallest: float
    largest: float
    bound: Bound


@dataclass(frozen=True)
class LearningRateSweep:
    """One size at several learning rates: the width, and every other size, length or batch size that varies."""

    size: Mapping[str, int]
    groups: tuple[SeedGroup, ...]
    # None where every run diverged
    optimum: Optimum | None

    @property
    def name(self) -> str:
        """The size in words: "width 64, depth 3"."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.size.items())


def swept_curves(comparison: Comparison) -> list[Curve]:
    """Return the curves of a comparison, in which runs of several lengths and batch sizes share a curve."""
    return make_curves(comparison.records, shared=(*LENGTHS, BATCH_SIZE))


def sweeps_of(comparison: Comparison, curve: Curve, metric: str) -> list[LearningRateSweep]:
    """Return the sweeps of a curve, of all sizes with at least three learning rates."""
    by_size: dict[tuple[int, ...], list[SeedGroup]] = {}
    for group in curve.groups:
        by_size.setdefault(tuple(_size(comparison, group.run).values()), []).append(group)
    return [
        LearningRateSweep(_size(comparison, groups[0].run), tuple(groups), _optimum(groups, metric))
        for groups in by_size.values()
        if len(groups) >= MIN_RATES
    ]


def varied_size(sweeps: Sequence[LearningRateSweep]) -> str:
    """Return the first size with several values among the sweeps; the width where none has."""
    return next((name for name in _SIZES if len({sweep.size.get(name) for sweep in sweeps}) > 1), _SIZES[0])


def along(size: str, sweeps: Sequence[LearningRateSweep]) -> list[list[LearningRateSweep]]:
    """Group sweeps that differ in one size only, and in those that follow from it, such as warmup from steps."""
    values = {sweep.size.get(size) for sweep in sweeps}
    others = [
        name for name in _SIZES if len({(sweep.size.get(size), sweep.size.get(name)) for sweep in sweeps}) > len(values)
    ]
    lines: dict[tuple[int | None, ...], list[LearningRateSweep]] = {}
    for sweep in sorted(sweeps, key=lambda sweep: sweep.size.get(size, 0)):
        lines.setdefault(tuple(map(sweep.size.get, others)), []).append(sweep)
    return list(lines.values())


def optimum_shift(sweeps: Sequence[LearningRateSweep]) -> Multiplier | None:
    """Return the largest optimum over the smallest: a lower bound where an optimum is at an end of its sweep.

    None with fewer than two optima, or where the largest may be smaller, or the smallest larger, than its sweep shows.
    """
    optima = sorted((sweep.optimum for sweep in sweeps if sweep.optimum), key=lambda optimum: optimum.lr)
    if len(optima) < 2 or optima[0].bound == ">" or optima[-1].bound == "<":
        return None
    return Multiplier(optima[-1].lr / optima[0].lr, ">" if any(optimum.bound for optimum in optima) else "")


def common_lr(sweeps: Sequence[LearningRateSweep], metric: str) -> tuple[float, float] | None:
    """Return the learning rate that serves all sizes best, of those that all have, and what it costs.

    That is the largest relative excess of the mean over the lowest of its size. None with fewer than two sizes, or
    where every learning rate diverges at some size.
    """
    means = [
        {group.run.training.lr: mean for group in sweep.groups if not group.diverged and (mean := group.mean(metric))}
        for sweep in sweeps
    ]
    shared = set.intersection(*map(set, means)) if len(means) > 1 else set()
    excesses = {lr: max(of_size[lr] / min(of_size.values()) - 1 for of_size in means) for lr in shared}
    return min(excesses.items(), key=lambda item: item[1]) if excesses else None


def best_lr(points: Sequence[Point]) -> tuple[float, Bound] | None:
    """Return the learning rate of the lowest loss, with a bound at an end of the sweep; None if all runs diverged.

    It is the vertex of the parabola through the lowest point and its two neighbours, over the log learning rate; or the
    lowest point itself, at an end or next to a learning rate that diverges.
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


def _size(comparison: Comparison, run: Run) -> dict[str, int]:
    names = (_SIZES[0], *(name for name in _SIZES[1:] if name in comparison.varied))
    return {name: run.hyperparameters[name] for name in names if run.hyperparameters.get(name) is not None}


def _optimum(groups: Sequence[SeedGroup], metric: str) -> Optimum | None:
    """Return the optimum of the means and the range over seeds; a learning rate where a seed diverges has no loss."""
    best = best_lr([(group.run.training.lr, None if group.diverged else group.mean(metric)) for group in groups])
    if best is None:
        return None
    seeds: dict[int, list[Point]] = {}
    for record in (record for group in groups for record in group.records):
        seeds.setdefault(record.run.seed, []).append((record.run.training.lr, metric_of(record, metric)))
    optima = [single[0] for points in seeds.values() if len(points) == len(groups) and (single := best_lr(points))]
    lr, bound = best
    return Optimum(lr, min(optima, default=lr), max(optima, default=lr), bound)
