"""Compute multipliers: how many times the compute dense needs for the same loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import gmean

from einlinear_lab.scaling.fit import Frontier, ScalingFit
from einlinear_lab.scaling.laws import Array, Interval, percentile_interval

# (compute, loss), both positive
Point = tuple[float, float]
Bound = Literal["", ">", "<"]

# computes along a frontier
_POINTS = 10


@dataclass(frozen=True)
class Multiplier:
    """A compute multiplier, or a lower (">") or upper ("<") bound on it where the dense curve ends before the loss."""

    value: float
    bound: Bound = ""

    def __str__(self) -> str:
        return f"{self.text}×"

    @property
    def text(self) -> str:
        return f"{self.bound} {self.value:.2f}".lstrip()


@dataclass(frozen=True)
class MultiplierOverSeeds:
    """The compute multipliers of several seeds: their number, range and geometric mean.

    The mean is a bound where some seeds are bounds, and None where upper and lower bounds mix.
    """

    mean: Multiplier | None
    smallest: Multiplier
    largest: Multiplier
    seeds: int

    def __str__(self) -> str:
        mean = str(self.mean or "seeds disagree")
        return mean if self.smallest == self.largest else f"{mean} ({self.smallest.text} to {self.largest.text})"


@dataclass(frozen=True)
class MultiplierAt:
    """How many times the compute dense needs for the same loss, at a point of a structure's frontier.

    The confidence interval is from the seeds of both; None where one has no resamples. An end is infinite, or zero,
    where the dense curve of a resample ends before the loss.
    """

    compute: float
    loss: float
    multiplier: Multiplier
    interval: Interval | None

    def __str__(self) -> str:
        if self.multiplier.bound or self.interval is None:
            return str(self.multiplier)
        return f"{self.multiplier} ({self.interval.low:.2f} to {self.interval.high:.2f})"


def compute_multiplier(dense: Iterable[Point], compute: float, loss: float) -> Multiplier:
    """Return how many times `compute` dense needs to reach `loss`.

    The dense curve is followed from its cheapest point to where it first reaches the loss, on straight lines between
    points in log-log space. A loss outside the curve gives a bound, never an extrapolation.

    >>> dense = [(100, 0.4), (400, 0.2)]
    >>> print(compute_multiplier(dense, 50, 0.2), "|", compute_multiplier(dense, 50, 0.1))
    8.00× | > 8.00×

    Raises:
        ValueError: no dense point.
    """
    curve = sorted(dense)
    if not curve:
        raise ValueError("the compute multiplier needs at least one point of the dense curve")
    if loss > curve[0][1]:
        return Multiplier(curve[0][0] / compute, "<")
    for (compute_0, loss_0), (compute_1, loss_1) in zip([curve[0], *curve], curve, strict=False):
        if loss_1 <= loss:
            share = math.log(loss_0 / loss) / math.log(loss_0 / loss_1) if loss_0 > loss_1 else 0.0
            return Multiplier(compute_0 * (compute_1 / compute_0) ** share / compute)
    return Multiplier(curve[-1][0] / compute, ">")


def multiplier_over_seeds(multipliers: Sequence[Multiplier]) -> MultiplierOverSeeds | None:
    """Return the geometric mean and the range of several seeds' multipliers; None without any.

    >>> print(multiplier_over_seeds([Multiplier(2.0), Multiplier(8.0, ">")]))
    > 4.00× (2.00 to > 8.00)
    """
    if not multipliers:
        return None
    # a mean of exact values and lower bounds is a lower bound, and likewise for upper bounds
    bounds = {multiplier.bound for multiplier in multipliers} - {""}
    mean = Multiplier(float(gmean([multiplier.value for multiplier in multipliers])), next(iter(bounds), ""))
    # of equal values, an upper bound is the smallest and a lower bound the largest
    ordered = sorted(multipliers, key=lambda multiplier: (multiplier.value, ("<", "", ">").index(multiplier.bound)))
    return MultiplierOverSeeds(mean if len(bounds) < 2 else None, ordered[0], ordered[-1], len(multipliers))


def multipliers_along(fit: ScalingFit, dense: ScalingFit, *, level: float = 0.95) -> tuple[MultiplierAt, ...]:
    """Return compute multipliers along a structure's frontier against the dense frontier.

    They are computed at ten log-spaced computes over the common range of both frontiers; without one the result is
    empty. Seeds of the two are resampled independently: where both share their batches, intervals are too wide.
    """
    low = max(fit.frontier.compute[0], dense.frontier.compute[0])
    high = min(fit.frontier.compute[-1], dense.frontier.compute[-1])
    if low > high:
        return ()
    computes = np.geomspace(low, high, _POINTS)
    # both usually resample with the same seed: shifting by one draw makes the pairs independent
    pairs = list(zip(fit.draws, dense.draws[1:] + dense.draws[:1]))
    resampled = [_multipliers(draw.frontier, dense_draw.frontier, computes) for draw, dense_draw in pairs]
    found = _multipliers(fit.frontier, dense.frontier, computes)
    intervals = [_interval(draws, level) for draws in zip(*resampled)] if resampled else [None] * len(found)
    return tuple(map(MultiplierAt, computes.tolist(), fit.frontier.loss_at(computes).tolist(), found, intervals))


def _multipliers(frontier: Frontier, dense: Frontier, computes: Array) -> list[Multiplier]:
    curve = list(zip(dense.compute.tolist(), dense.loss.tolist()))
    losses = frontier.loss_at(computes)
    return [compute_multiplier(curve, compute, loss) for compute, loss in zip(computes.tolist(), losses.tolist())]


def _interval(multipliers: Sequence[Multiplier], level: float) -> Interval:
    """Return the percentile interval; a bound stands for any multiplier beyond it."""
    lows = [0.0 if multiplier.bound == "<" else multiplier.value for multiplier in multipliers]
    highs = [math.inf if multiplier.bound == ">" else multiplier.value for multiplier in multipliers]
    return percentile_interval(lows, highs, level)
