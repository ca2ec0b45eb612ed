"""Confidence intervals from two sources.

seeds       percentiles over resampled seeds: the effect of training again with other seeds
regression  the t-distribution of a least-squares fit: the scatter of the points around the law, as if they were
            independent. Points of one training curve are not, which makes these intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from einlinear_lab.scaling.laws import Array, PowerLaw, assumed_floor, covariance, gradient

Source = Literal["seeds", "regression"]
Quantity = Literal["scale", "exponent", "floor"]


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: its ends; infinite where the data sets no end.
        source: "seeds" or "regression".
        level: confidence level.
    """

    low: float
    high: float
    source: Source
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g} ({100 * self.level:g} %, {self.source})"


def percentile_interval(lows: Sequence[float], highs: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval between percentiles over resamples.

    Args:
        lows, highs: the least and the largest possible value in every resample, equal where the value is exact; may be
            infinite.
        level: confidence level.
    """
    beyond = (1 - check_level(level)) / 2
    # order statistics: interpolated quantiles are NaN next to an infinity
    below = math.floor(beyond * (len(lows) - 1))
    return Interval(float(np.sort(lows)[below]), float(np.sort(highs)[len(highs) - 1 - below]), "seeds", level)


def t_interval(value: float, stderr: float, freedom: int, level: float = 0.95) -> Interval:
    """Return the interval of a least-squares estimate with so many degrees of freedom."""
    half = float(t.ppf((1 + check_level(level)) / 2, freedom)) * stderr
    return Interval(value - half, value + half, "regression", level)


def law_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, quantity: Quantity, level: float = 0.95
) -> Interval | None:
    """Return the regression interval of a parameter of a law, or None without degrees of freedom.

    The interval of an assumed floor is that floor.
    """
    if quantity == "floor" and law.floor_identified is None:
        return Interval(law.floor, law.floor, "regression", check_level(level))
    value = math.log(law.scale) if quantity == "scale" else float(getattr(law, quantity))
    direction = np.eye(3)[("scale", "exponent", "floor").index(quantity)]
    interval = _delta_interval(law, compute, loss, value, direction, level)
    return _exponential(interval) if interval and quantity == "scale" else interval


def prediction_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, at: float, level: float = 0.95
) -> Interval | None:
    """Return the regression interval of a law's loss at a compute, or None without degrees of freedom.

    The interval is that of the law; a single run scatters around the law in addition.
    """
    floor = assumed_floor(law)
    interval = _delta_interval(law, compute, loss, math.log(law(at) - floor), gradient(law, np.array([at]))[0], level)
    return _exponential(interval, floor) if interval else None


def check_level(level: float) -> float:
    """Return the confidence level.

    Raises:
        ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must be between 0 and 1, such as 0.95 for 95 %, not {level}")
    return level


def _delta_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, value: float, direction: Array, level: float
) -> Interval | None:
    """Return the interval of a function of a law's parameters from its gradient by them (the delta method)."""
    matrix = covariance(law, compute, loss)
    freedom = np.size(np.asarray(compute)) - len(matrix)
    if freedom < 1:
        return None
    direction = direction[: len(matrix)]
    return t_interval(value, math.sqrt(direction @ matrix @ direction), freedom, level)


def _exponential(interval: Interval, plus: float = 0.0) -> Interval:
    low, high = plus + math.exp(interval.low), plus + float(np.exp(min(interval.high, 700.0)))
    return Interval(low, high, interval.source, interval.level)
