"""Confidence intervals: percentiles over resampled seeds, or the t-distribution of a least-squares fit.

Regression takes points as independent. Those of one training curve are not, which makes its intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Return the regression interval of a parameter (an assumed floor is exact), or None without degrees of freedom."""
    if quantity == "floor" and law.floor_identified is None:
        return Interval(law.floor, law.floor, "regression", check_level(level))
    direction = np.eye(3)[("scale", "exponent", "floor").index(quantity)]
    if quantity == "scale":
        return _exponential(_delta_interval(law, compute, loss, math.log(law.scale), direction, level))
    return _delta_interval(law, compute, loss, float(getattr(law, quantity)), direction, level)


def prediction_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, at: float, level: float = 0.95
) -> Interval | None:
    """Return the regression interval of a law's loss at a compute, without the scatter of a single run; else None."""
    floor, direction = assumed_floor(law), gradient(law, np.array([at]))[0]
    return _exponential(_delta_interval(law, compute, loss, math.log(law(at) - floor), direction, level), floor)


def check_level(level: float) -> float:
    """Return a confidence level. Raises ValueError if it is not between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must be between 0 and 1, such as 0.95 for 95 %, not {level}")
    return level


def _delta_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, value: float, direction: Array, level: float
) -> Interval | None:
    """Return the interval of a function of a law's parameters from its gradient by them (the delta method)."""
    matrix = covariance(law, compute, loss)
    freedom, direction = np.size(compute) - len(matrix), direction[: len(matrix)]
    return t_interval(value, math.sqrt(direction @ matrix @ direction), freedom, level) if freedom > 0 else None


def _exponential(interval: Interval | None, plus: float = 0.0) -> Interval | None:
    if interval is None:
        return None
    return replace(interval, low=plus + math.exp(interval.low), high=plus + math.exp(min(interval.high, 700.0)))
