"""Power laws of the loss over compute, without a floor, with an assumed one, or with one that is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import f

Array = NDArray[np.float64]

MIN_POINTS = 2  # a line
MIN_POINTS_WITH_FLOOR = 4  # three numbers fit any three points
STEEPEST = 10.0  # exponents beyond it mean that all but the first points lie on the floor
HUBER = 0.02  # log residuals larger than this weigh linearly: points this far off the law are not noise of a frontier
FLOOR_STARTS = (0.0, 0.5, 0.9)  # shares of the lowest loss from which the floor is searched


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * compute ** -exponent.

    Attributes:
        exponent, scale: of the law.
        stderr: standard error of the exponent by regression; NaN with two points, which any line fits.
        r_squared: share of the variance that the law explains, of the logarithm of what the fit is of: of loss - floor
            with an assumed floor, of the loss with a fitted one.
        floor: the loss that no compute gets below.
        floor_identified: whether the points tell a fitted floor from none; None where the floor was assumed.
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
    """The least-squares line through the logarithms of compute and of loss - floor.

    >>> law = power_law([100, 400], [0.4, 0.2])
    >>> round(law.exponent, 6), round(law(1600), 6)
    (0.5, 0.1)

    Args:
        compute, loss: of every point, both (points,).
        floor: assumed, in units of the loss.

    Raises:
        ValueError: points that have no logarithm, or fewer than two different computes.
    """
    x, y = log_points(compute, loss, floor)
    _require_points(x, MIN_POINTS, "a power law")
    slope, intercept = np.polyfit(x, y, 1)
    return _with_quality(PowerLaw(-float(slope), math.exp(intercept), math.nan, math.nan, floor), compute, loss)


def power_law_with_floor(compute: ArrayLike, loss: ArrayLike, *, near: float | None = None) -> PowerLaw:
    """A power law and its floor, by robust regression of the log loss: Huber's loss is minimised from several starts.

    Where the best law with no floor is not significantly worse (F-test at 5 %), the points do not say where the floor
    is: `floor_identified` is False, and exponent and scale, which trade with the floor, mean little.

    >>> compute = 10.0 ** np.arange(6, 13)
    >>> law = power_law_with_floor(compute, 1.5 + 200 * compute**-0.3)
    >>> round(law.floor, 4), round(law.exponent, 4), law.floor_identified
    (1.5, 0.3, True)

    Args:
        compute, loss: of every point, both (points,).
        near: the one floor to start from, where it is known about.

    Raises:
        ValueError: points that have no logarithm, or fewer than four different computes.
    """
    x, y = log_points(compute, loss)
    _require_points(x, MIN_POINTS_WITH_FLOOR, "a power law with a floor")
    centre = float(x.mean())
    starts = [share * math.exp(y.min()) for share in FLOOR_STARTS] if near is None else [near]
    found = [_search(x - centre, y, start) for start in starts]
    cost, (log_scale, exponent, floor) = min(found, key=lambda each: each[0])
    free = len(x) - 3
    worse = cost * (1 + f.ppf(0.95, 1, free) / free) + 1e-16 * len(x)  # the second term: rounding, of exact points
    identified = _search(x - centre, y, 0.0, fixed=True)[0] > worse
    scale = math.exp(log_scale + exponent * centre)
    law = PowerLaw(float(exponent), scale, math.nan, math.nan, float(floor), bool(identified))
    return _with_quality(law, compute, loss)


def covariance(law: PowerLaw, compute: ArrayLike, loss: ArrayLike) -> Array:
    """The covariance of a law's (log scale, exponent), and floor where it was fitted, as if points were independent.

    For a line this is the textbook formula, otherwise its linearisation at the law. NaN where no degrees of freedom
    are left.
    """
    x, y = log_points(compute, loss, assumed_floor(law))
    jacobian = gradient(law, np.exp(x))
    free = len(x) - jacobian.shape[1]
    variance = _squares(_residuals(law, x, y)) / free if free > 0 else math.nan
    sizes = np.linalg.norm(jacobian, axis=0)  # very different: columns are scaled to one
    inverse = np.linalg.pinv(jacobian / sizes) / sizes[:, None]
    return np.asarray(variance * inverse @ inverse.T)


def gradient(law: PowerLaw, compute: Array) -> Array:
    """The gradient of log(loss - assumed floor) by (log scale, exponent), and by a fitted floor: (points, 2 or 3)."""
    line = np.stack([np.ones_like(compute), -np.log(compute)], axis=-1)
    if law.floor_identified is None:
        return line
    loss = law(compute)[:, None]
    return np.concatenate([line * (1 - law.floor / loss), 1 / loss], axis=-1)


def assumed_floor(law: PowerLaw) -> float:
    """What is subtracted before logarithms are taken: nothing where the floor was fitted."""
    return law.floor if law.floor_identified is None else 0.0


def _with_quality(law: PowerLaw, compute: ArrayLike, loss: ArrayLike) -> PowerLaw:
    """The law with its standard error and R²."""
    x, y = log_points(compute, loss, assumed_floor(law))
    spread = _squares(y - y.mean())
    r_squared = 1 - _squares(_residuals(law, x, y)) / spread if spread else math.nan
    return replace(law, stderr=math.sqrt(covariance(law, compute, loss)[1, 1]), r_squared=r_squared)


def _residuals(law: PowerLaw, x: Array, y: Array) -> Array:
    return y - np.log(law(np.exp(x)) - assumed_floor(law))


def _squares(values: Array) -> float:
    return float(values @ values)


def log_points(compute: ArrayLike, loss: ArrayLike, floor: float = 0.0) -> tuple[Array, Array]:
    """Logarithms of compute and of loss - floor.

    Raises:
        ValueError: no points, arrays that are not of one equal length, compute that is not positive and finite, or
            loss that is not finite and above the floor.
    """
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    if compute.ndim != 1 or compute.shape != loss.shape or not compute.size:
        raise ValueError(
            f"compute and loss are of the same points, at least one: give two arrays of one length, "
            f"not of shapes {compute.shape} and {loss.shape}"
        )
    for values, what, least in ((compute, "compute", 0.0), (loss, "loss", floor)):
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > least)))
        if wrong.size:
            raise ValueError(
                f"{what} must be finite and above {least:g}, but point {wrong[0]} has {values[wrong[0]]:g}"
            )
    return np.log(compute), np.log(loss - floor)


def _search(x: Array, y: Array, floor: float, fixed: bool = False) -> tuple[float, Array]:
    """Huber's loss and (log scale, exponent, floor) at the minimum nearest to a floor, or with this floor."""

    def parts(numbers: Array) -> tuple[Array, Array]:
        """Floor and power law, as logarithms."""
        with np.errstate(divide="ignore"):  # the logarithm of no floor
            return np.log(np.full_like(x, floor if fixed else numbers[2])), numbers[0] - numbers[1] * x

    def residuals(numbers: Array) -> Array:
        return np.asarray(np.logaddexp(*parts(numbers)) - y)

    def jacobian(numbers: Array) -> Array:
        log_floor, log_power = parts(numbers)
        power = np.asarray(expit(log_power - log_floor))  # its share of the loss
        columns = [power, -power * x, np.exp(-np.logaddexp(log_floor, log_power))]
        return np.stack(columns[: len(numbers)], axis=1)

    loss = np.exp(y)
    slope, intercept = np.polyfit(x, np.log(np.maximum(loss - floor, 0.01 * loss)), 1)
    free = 2 if fixed else 3
    first = [intercept, min(max(-slope, 0.0), STEEPEST), min(floor, loss.max())][:free]
    bounds = ([-math.inf, 0.0, 0.0][:free], [math.inf, STEEPEST, loss.max()][:free])
    found = least_squares(residuals, first, jacobian, bounds, "dogbox", loss="huber", f_scale=HUBER)
    return float(found.cost), np.append(found.x, [floor] if fixed else [])


def _require_points(log_compute: Array, least: int, what: str) -> None:
    different = len(np.unique(log_compute))
    if different < least:
        raise ValueError(f"{what} needs points of at least {least} different computes, got {different}")
