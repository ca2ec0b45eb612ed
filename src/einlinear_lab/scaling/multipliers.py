"""Compute multipliers: how many times the compute dense needs for the same loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from einlinear_lab.scaling.fit import ScalingFit
from einlinear_lab.scaling.frontier import Frontier
from einlinear_lab.scaling.intervals import Interval, percentile_interval
from einlinear_lab.scaling.laws import Array

Point = tuple[float, float]  # (compute, loss), both positive
Bound = Literal["", ">", "<"]

_PLACES = 10  # along a frontier


@dataclass(frozen=True)
class Multiplier:
    """How many times the compute dense needs for the same loss, or a bound where the curve of dense ends before it.

    Attributes:
        value: the multiplier, or what it is above (">") or below ("<").
        bound: "" where value is the multiplier itself.
    """

    value: float
    bound: Bound = ""

    def __str__(self) -> str:
        return f"{self.text}×"

    @property
    def text(self) -> str:
        """The number and its bound, without the multiplication sign."""
        return f"{self.bound} {self.value:.2f}".lstrip()


@dataclass(frozen=True)
class Spread:
    """Multipliers of several seeds.

    Attributes:
        mean: their geometric mean, itself a bound where some of them are; None where upper and lower bounds mix.
        smallest, largest: of them.
        seeds: how many there are.
    """

    mean: Multiplier | None
    smallest: Multiplier
    largest: Multiplier
    seeds: int

    def __str__(self) -> str:
        mean = str(self.mean) if self.mean else "seeds disagree"
        ends = f" ({self.smallest.text} to {self.largest.text})"
        return mean if self.smallest == self.largest else mean + ends


@dataclass(frozen=True)
class MultiplierAt:
    """The compute multiplier at one compute.

    Attributes:
        compute: of the structure that is compared with dense.
        loss: on its frontier there.
        multiplier: how many times the compute dense needs for this loss.
        interval: from seeds of both; None where one of them has no resamples. An end is infinite, or zero, where the
            dense curve of a resample ends before it says.
    """

    compute: float
    loss: float
    multiplier: Multiplier
    interval: Interval | None


def compute_multiplier(dense: Iterable[Point], compute: float, loss: float) -> Multiplier:
    """How many times `compute` dense needs to reach `loss`.

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


def spread(multipliers: Sequence[Multiplier]) -> Spread | None:
    """The geometric mean and the range of several seeds' multipliers; None where there are none.

    >>> print(spread([Multiplier(2.0), Multiplier(8.0, ">")]))
    > 4.00× (2.00 to > 8.00)
    """
    if not multipliers:
        return None
    bounds = {multiplier.bound for multiplier in multipliers} - {""}
    mean = None
    if len(bounds) < 2:  # a mean of values and lower bounds is a lower bound, and likewise for upper ones
        logs = [math.log(multiplier.value) for multiplier in multipliers]
        mean = Multiplier(math.exp(math.fsum(logs) / len(logs)), next(iter(bounds), ""))
    # an upper bound is the smallest of equal values, a lower bound the largest
    ordered = sorted(multipliers, key=lambda multiplier: (multiplier.value, ("<", "", ">").index(multiplier.bound)))
    return Spread(mean, ordered[0], ordered[-1], len(multipliers))


def multipliers_along(fit: ScalingFit, dense: ScalingFit, *, level: float = 0.95) -> tuple[MultiplierAt, ...]:
    """Compute multipliers along a structure's frontier, against dense's frontier, both interpolated in log-log space.

    They are those of ten computes, log-spaced over what both frontiers cover; of none where they have no compute in
    common.

    The seeds of the two are resampled independently. Where they share their batches, so that the difference varies
    less than that, the intervals are too wide rather than too narrow.

    Args:
        fit, dense: frontiers of the structure and of dense.
        level: of confidence.
    """
    low = max(fit.frontier.compute[0], dense.frontier.compute[0])
    high = min(fit.frontier.compute[-1], dense.frontier.compute[-1])
    if low > high:
        return ()
    places = np.geomspace(low, high, _PLACES)
    # both draw with the same seed as a rule: next to each other, not at the same place, their draws are independent
    pairs = list(zip(fit.draws, dense.draws[1:] + dense.draws[:1]))
    drawn = [_multipliers(own.frontier, other.frontier, places) for own, other in pairs]
    return tuple(
        MultiplierAt(
            compute=float(place),
            loss=float(fit.frontier.loss_at(place)),
            multiplier=multiplier,
            interval=_interval([multipliers[i] for multipliers in drawn], level) if drawn else None,
        )
        for i, (place, multiplier) in enumerate(zip(places, _multipliers(fit.frontier, dense.frontier, places)))
    )


def _multipliers(frontier: Frontier, dense: Frontier, places: Array) -> list[Multiplier]:
    curve = list(zip(dense.compute.tolist(), dense.loss.tolist()))
    losses = frontier.loss_at(places)
    return [compute_multiplier(curve, place, loss) for place, loss in zip(places.tolist(), losses.tolist())]


def _interval(multipliers: Sequence[Multiplier], level: float) -> Interval:
    """The percentile interval; a multiplier that is a bound may be anything beyond it."""
    lows = [0.0 if multiplier.bound == "<" else multiplier.value for multiplier in multipliers]
    highs = [math.inf if multiplier.bound == ">" else multiplier.value for multiplier in multipliers]
    return percentile_interval(lows, highs, level)
