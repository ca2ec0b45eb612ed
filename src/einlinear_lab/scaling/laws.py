"""Power laws of the loss over compute, with no floor, an assumed or a fitted one, and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import f, t

Array = NDArray[np.float64]
Source = Literal["seeds", "regression"]
Quantity = Literal["scale", "exponent", "floor"]

# three parameters fit any three points
MIN_POINTS_WITH_FLOOR = 4
# a steeper exponent means that all but the first points lie on the floor
MAX_EXPONENT = 10.0
# larger log residuals weigh linearly: points this far off the law are not the noise of a frontier
HUBER_SCALE = 0.02
# initial floors of the search, as shares of the lowest loss
INITIAL_FLOORS = (0.0, 0.5, 0.9)


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * compute ** -exponent.

    Attributes:
        stderr: standard error of the exponent by regression; NaN with two points, which any line fits.
        r_squared: share of the variance that the law explains, of log(loss - floor) with an assumed floor and of
            log(loss) with a fitted one.
        floor_identified: whether a fitted floor is significantly better than none; None for an assumed floor.
    """

    exponent: float
    scale: float
    stderr: float
    r_squared: float
    floor: float = 0.0
    floor_identified: bool | None = None

    @overload
    def __call__(self, compute: float) -> float: ...
    @overload
    def __call__(self, compute: Array) -> Array: ...
    def __call__(self, compute: float | Array) -> float | Array:
        return self.floor + self.scale * compute**-self.exponent


def power_law(compute: ArrayLike, loss: ArrayLike, *, floor: float = 0.0) -> PowerLaw:
    """Fit a power law: the least-squares line through the logarithms of compute and of loss - floor.

    >>> law = power_law([100, 400], [0.4, 0.2])
    >>> round(law.exponent, 6), round(law(1600), 6)
    (0.5, 0.1)

    Args:
        compute, loss: the points, both (points,).
        floor: assumed irreducible loss.

    Raises:
        ValueError: a point has no logarithm, or there are fewer than two different computes.
    """
    x, y = log_points(compute, loss, floor)
    _require_points(x, 2, "a power law")
    slope, intercept = np.polyfit(x, y, 1)
    return _with_quality(PowerLaw(-float(slope), math.exp(intercept), math.nan, math.nan, floor), compute, loss)


def power_law_with_floor(compute: ArrayLike, loss: ArrayLike, *, near: float | None = None) -> PowerLaw:
    """Fit a power law and its floor by robust regression: Huber's loss of log residuals, minimised from several starts.

    Where the best law without a floor is not significantly worse (F-test at 5 %), `floor_identified` is False: exponent
    and scale, which trade off against the floor, then mean little.

    >>> compute = 10.0 ** np.arange(6, 13)
    >>> law = power_law_with_floor(compute, 1.5 + 200 * compute**-0.3)
    >>> round(law.floor, 4), round(law.exponent, 4), law.floor_identified
    (1.5, 0.3, True)

    Args:
        compute, loss: the points, both (points,).
        near: start from this floor only.

    Raises:
        ValueError: a point has no logarithm, or there are fewer than four different computes.
    """
    x, y = log_points(compute, loss)
    _require_points(x, MIN_POINTS_WITH_FLOOR, "a power law with a floor")
    centre = float(x.mean())
    starts = [share * math.exp(y.min()) for share in INITIAL_FLOORS] if near is None else [near]
    fits = [_minimise(x - centre, y, start) for start in starts]
    cost, (log_scale, exponent, floor) = min(fits, key=lambda fit: fit[0])
    freedom = len(x) - 3
    # the second term is the rounding of exact points
    significant = cost * (1 + f.ppf(0.95, 1, freedom) / freedom) + 1e-16 * len(x)
    identified = _minimise(x - centre, y, 0.0, fixed=True)[0] > significant
    scale = math.exp(log_scale + exponent * centre)
    law = PowerLaw(float(exponent), scale, math.nan, math.nan, float(floor), bool(identified))
    return _with_quality(law, compute, loss)


@dataclass(frozen=True)
class Interval:
    """A confidence interval, by percentiles over resampled "seeds", or by "regression" of independent points.

    An end is infinite where the data sets none. Points of one training curve make regression intervals too narrow.
    """

    low: float
    high: float
    source: Source
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g} ({100 * self.level:g} %, {self.source})"


def percentile_interval(lows: Sequence[float], highs: Sequence[float], level: float) -> Interval:
    """Return the interval of the least and the largest possible value in every resample; values may be infinite."""
    beyond = (1 - check_level(level)) / 2
    # order statistics: interpolated quantiles are NaN next to an infinity
    below = math.floor(beyond * (len(lows) - 1))
    return Interval(float(np.sort(lows)[below]), float(np.sort(highs)[len(highs) - 1 - below]), "seeds", level)


def t_interval(value: float, stderr: float, freedom: int, level: float) -> Interval:
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
    floor, direction = _assumed_floor(law), _gradient(law, np.array([at]))[0]
    return _exponential(_delta_interval(law, compute, loss, math.log(law(at) - floor), direction, level), floor)


def check_level(level: float) -> float:
    """Return a confidence level. Raises ValueError if it is not between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must be between 0 and 1, such as 0.95 for 95 %, not {level}")
    return level


def log_points(compute: ArrayLike, loss: ArrayLike, floor: float = 0.0) -> tuple[Array, Array]:
    """Return the logarithms of compute and of loss - floor. Raises ValueError for points without."""
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    if compute.ndim != 1 or compute.shape != loss.shape or not compute.size:
        shapes = f"{compute.shape} and {loss.shape}"
        raise ValueError(
            f"compute and loss must be two arrays of one length, at least one point, not of shapes {shapes}"
        )
    for values, name, least in ((compute, "compute", 0.0), (loss, "loss", floor)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > least)))
        if bad.size:
            raise ValueError(f"{name} must be finite and above {least:g}, but point {bad[0]} has {values[bad[0]]:g}")
    return np.log(compute), np.log(loss - floor)


def _delta_interval(
    law: PowerLaw, compute: ArrayLike, loss: ArrayLike, value: float, direction: Array, level: float
) -> Interval | None:
    """Return the interval of a function of a law's parameters from its gradient by them (the delta method)."""
    matrix = _covariance(law, compute, loss)
    freedom, direction = np.size(compute) - len(matrix), direction[: len(matrix)]
    return t_interval(value, math.sqrt(direction @ matrix @ direction), freedom, level) if freedom > 0 else None


def _exponential(interval: Interval | None, plus: float = 0.0) -> Interval | None:
    if interval is None:
        return None
    return replace(interval, low=plus + math.exp(interval.low), high=plus + math.exp(min(interval.high, 700.0)))


def _covariance(law: PowerLaw, compute: ArrayLike, loss: ArrayLike) -> Array:
    """Return the covariance of (log scale, exponent[, fitted floor]), linearised; NaN without degrees of freedom."""
    x, y = log_points(compute, loss, _assumed_floor(law))
    jacobian = _gradient(law, np.exp(x))
    freedom = len(x) - jacobian.shape[1]
    residuals = _residuals(law, x, y)
    variance = residuals @ residuals / freedom if freedom > 0 else math.nan
    # columns differ in size by orders of magnitude
    sizes = np.linalg.norm(jacobian, axis=0)
    inverse = np.linalg.pinv(jacobian / sizes) / sizes[:, None]
    return np.asarray(variance * inverse @ inverse.T)


def _gradient(law: PowerLaw, compute: Array) -> Array:
    """Return the gradient of log(loss - assumed floor) by (log scale, exponent[, fitted floor]), (points, 2 or 3)."""
    line = np.stack([np.ones_like(compute), -np.log(compute)], axis=-1)
    if law.floor_identified is None:
        return line
    loss = law(compute)[:, None]
    return np.concatenate([line * (1 - law.floor / loss), 1 / loss], axis=-1)


def _assumed_floor(law: PowerLaw) -> float:
    """Return the floor that the law took as known; 0 where it fitted one."""
    return law.floor if law.floor_identified is None else 0.0


def _with_quality(law: PowerLaw, compute: ArrayLike, loss: ArrayLike) -> PowerLaw:
    x, y = log_points(compute, loss, _assumed_floor(law))
    residuals, spread = _residuals(law, x, y), y - y.mean()
    r_squared = 1 - float(residuals @ residuals) / total if (total := float(spread @ spread)) else math.nan
    return replace(law, stderr=math.sqrt(_covariance(law, compute, loss)[1, 1]), r_squared=r_squared)


def _residuals(law: PowerLaw, x: Array, y: Array) -> Array:
    return y - np.log(law(np.exp(x)) - _assumed_floor(law))


def _minimise(x: Array, y: Array, floor: float, fixed: bool = False) -> tuple[float, Array]:
    """Return the least Huber's loss from an initial floor, or with a fixed one, at (log scale, exponent, floor)."""

    def log_terms(parameters: Array) -> tuple[Array, Array]:
        with np.errstate(divide="ignore"):
            return np.log(np.full_like(x, floor if fixed else parameters[2])), parameters[0] - parameters[1] * x

    def residuals(parameters: Array) -> Array:
        return np.asarray(np.logaddexp(*log_terms(parameters)) - y)

    def jacobian(parameters: Array) -> Array:
        log_floor, log_power = log_terms(parameters)
        share_of_power = np.asarray(expit(log_power - log_floor))
        columns = [share_of_power, -share_of_power * x, np.exp(-np.logaddexp(log_floor, log_power))]
        return np.stack(columns[: len(parameters)], axis=1)

    loss, count = np.exp(y), 2 if fixed else 3
    slope, intercept = np.polyfit(x, np.log(np.maximum(loss - floor, 0.01 * loss)), 1)
    bounds = np.array([[-math.inf, 0.0, 0.0], [math.inf, MAX_EXPONENT, loss.max()]])[:, :count]
    start = np.clip([intercept, -slope, floor][:count], *bounds)
    fit = least_squares(residuals, start, jacobian, bounds, "dogbox", loss="huber", f_scale=HUBER_SCALE)
    return float(fit.cost), np.append(fit.x, [floor] if fixed else [])


def _require_points(log_compute: Array, least: int, law: str) -> None:
    if (different := len(np.unique(log_compute))) < least:
        raise ValueError(f"{law} needs points of at least {least} different computes, got {different}")
