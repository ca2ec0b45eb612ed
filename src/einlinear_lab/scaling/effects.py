"""What the exponents of a structure do to its loss: psi (rank), nu (compute intensity), omega (parameter sharing)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from einlinear_lab.scaling.intervals import Interval, check_level, t_interval


@dataclass(frozen=True)
class Effect:
    """A coefficient of a linear regression.

    Attributes:
        value: NaN where the data cannot tell it from the other coefficients.
        stderr: of the value; NaN where no degrees of freedom are left.
        interval: by the t-distribution; None where value or stderr is NaN.
    """

    value: float
    stderr: float
    interval: Interval | None


@dataclass(frozen=True)
class ExponentEffects:
    """log(loss / dense loss) = offset + psi_effect * (psi - 1) + nu_effect * (nu - 1) + omega_effect * omega.

    Attributes:
        psi, nu, omega: the effect of one unit more of it: it multiplies the loss by e to this.
        offset: what is left at dense's own exponents, (1, 1, 0).
        r_squared: share of the variance of the log ratio that all three explain; NaN where it does not vary, or
            where there are no more points than coefficients, which then explain anything.
        points: how many the regression is of.
    """

    psi: Effect
    nu: Effect
    omega: Effect
    offset: Effect
    r_squared: float
    points: int


def exponent_effects(
    psi: ArrayLike, nu: ArrayLike, omega: ArrayLike, loss: ArrayLike, dense_loss: ArrayLike, *, level: float = 0.95
) -> ExponentEffects:
    """The effects of psi, nu and omega on log loss at a common compute, by least squares.

    An effect that the structures do not show by itself, of an exponent that is the same in all of them or always
    changes along with another one, is NaN; the others are still right.

    >>> psi, nu, omega = [1, 1, 1, 0.5, 0.75], [1, 0.5, 0.5, 0.5, 0.75], [0, 0.5, 0, 0, 0]
    >>> effects = exponent_effects(psi, nu, omega, [1.0, 1.2, 1.0, 1.1, 1.05], dense_loss=1.0)
    >>> [round(effect.value, 2) for effect in (effects.psi, effects.nu, effects.omega)]
    [-0.19, 0.0, 0.36]

    Args:
        psi, nu, omega: of every structure, each (points,).
        loss: of every structure, (points,); less a floor where one is assumed.
        dense_loss: at the same compute, one number or one for each point; less the same floor.
        level: of the intervals.

    Raises:
        ValueError: arrays that are not of one length, numbers that are not finite, or losses that are not positive.
    """
    loss, dense_loss = np.asarray(loss, dtype=float), np.asarray(dense_loss, dtype=float)
    exponents = [np.asarray(values, dtype=float) for values in (psi, nu, omega)]
    shapes = [values.shape for values in (*exponents, loss)]
    if loss.ndim != 1 or not loss.size or len(set(shapes)) > 1 or dense_loss.shape not in ((), loss.shape):
        raise ValueError(
            f"psi, nu, omega and loss are one number for each structure, not of shapes {shapes}, and dense_loss is one "
            f"number for all or for each of them, not of shape {dense_loss.shape}"
        )
    if not all(np.isfinite(values).all() for values in (*exponents, loss, dense_loss)):
        raise ValueError("psi, nu, omega, loss and dense_loss must be finite")
    if not (loss > 0).all() or not (dense_loss > 0).all():
        raise ValueError(f"losses must be positive, but the lowest is {min(loss.min(), dense_loss.min()):g}")
    check_level(level)
    ratio = np.log(loss / dense_loss)
    design = np.stack([exponents[0] - 1, exponents[1] - 1, exponents[2], np.ones_like(loss)], axis=1)
    inverse = np.linalg.pinv(design, rcond=1e-10)
    values = inverse @ ratio
    residuals = ratio - design @ values
    resolution = np.diag(inverse @ design)  # 1 for coefficients that are the same in all least-squares solutions
    free = len(loss) - round(float(resolution.sum()))
    variance = float(residuals @ residuals) / free if free else math.nan

    def effect(i: int) -> Effect:
        if not math.isclose(resolution[i], 1, rel_tol=1e-6):
            return Effect(math.nan, math.nan, None)
        value, stderr = float(values[i]), math.sqrt(variance * float(inverse[i] @ inverse[i]))
        return Effect(value, stderr, t_interval(value, stderr, free, level) if free else None)

    spread = float(np.sum((ratio - ratio.mean()) ** 2))
    return ExponentEffects(
        psi=effect(0),
        nu=effect(1),
        omega=effect(2),
        offset=effect(3),
        r_squared=1 - float(residuals @ residuals) / spread if spread and free else math.nan,
        points=len(loss),
    )
