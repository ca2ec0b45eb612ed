"""Intervals, and where they come from.

From seeds: percentiles over resamples of the seeds. They hold what training again with other seeds would change.
From regression: t-distribution of a least-squares fit. They hold how well the points lie on the law, as if they were
independent, which the points of one training curve are not: then they are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from einlinear_lab.scaling.laws import PowerLaw, assumed_floor, covariance, gradient

Source = Literal["seeds", "regression"]
Quantity = Literal["exponent", "scale", "floor"]


@dataclass(frozen=True)
class Interval:
    """Where a number lies, at a level of confidence.

    Attributes:
        low, high: its ends; infinite where the data sets no end.
        source: what the uncertainty is about, "seeds" or "regression".
        level: of confidence.
    """

    low: float
    high: float
    source: Source
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g} ({100 * self.level:g} %, {self.source})"


def percentile_interval(lows: Sequence[float], highs: Sequence[float], level: float = 0.95) -> Interval:
    """The interval from the ends of what every resample says, which are equal where it says a number, or infinite."""
    beyond = (1 - check_level(level)) / 2
    # order statistics rather than interpolated quantiles, which are NaN beside an infinity
    below = math.floor(beyond * (len(lows) - 1))
    return Interval(float(np.sort(lows)[below]), float(np.sort(highs)[len(highs) - 1 - below]), "seeds", level)


def t_interval(value: float, stderr: float, free: int, level: float = 0.95) -> Interval:
    """The interval of a number that was estimated by least squares, with `free` degrees of freedom."""
    half = float(t.ppf((1 + check_level(level)) / 2, free)) * stderr
    return Interval(value - half, value + half, "regression", level)


def law_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, quantity: Quantity, level: float = 0.95
) -> Interval | None:
    """The interval of a number of a law, from the regression on its points; None where it goes through all of them.

    An assumed floor has the interval of one value.
    """
    if quantity == "floor" and law.floor_identified is None:
        return Interval(law.floor, law.floor, "regression", check_level(level))
    matrix, free = covariance(law, compute, loss), np.size(np.asarray(compute))
    free -= len(matrix)
    if free < 1:
        return None
    at = ("scale", "exponent", "floor").index(quantity)
    stderr = math.sqrt(matrix[at, at])
    if quantity == "scale":
        return _exponential(t_interval(math.log(law.scale), stderr, free, level))
    return t_interval(law.exponent if quantity == "exponent" else law.floor, stderr, free, level)


def prediction_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, at: float, level: float = 0.95
) -> Interval | None:
    """The interval of a law's loss at a compute, from the regression on its points; None as in `law_interval`.

    It is about the law itself: a single run scatters around it in addition.
    """
    matrix = covariance(law, compute, loss)
    free = np.size(np.asarray(compute)) - len(matrix)
    if free < 1:
        return None
    slope, floor = gradient(law, np.array([at]))[0], assumed_floor(law)
    return _exponential(t_interval(math.log(law(at) - floor), math.sqrt(slope @ matrix @ slope), free, level), floor)


def check_level(level: float) -> float:
    """The level, checked.

    Raises:
        ValueError: a level that is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is between 0 and 1, 0.95 for 95 %, not {level}")
    return level


def _exponential(interval: Interval, plus: float = 0.0) -> Interval:
    low, high = plus + math.exp(interval.low), plus + float(np.exp(min(interval.high, 700.0)))
    return Interval(low, high, interval.source, interval.level)
