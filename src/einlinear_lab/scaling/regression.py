"""Linear regression of the loss on a structure's exponents: psi (rank), nu (compute) and omega (parameter sharing)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from einlinear_lab.scaling.laws import Interval, check_level, t_interval


@dataclass(frozen=True)
class Coefficient:
    """A coefficient of a linear regression, its standard error and its confidence interval by the t-distribution.

    The value is NaN where the data does not identify it, the error without degrees of freedom; the interval is None.
    """

    value: float
    stderr: float
    interval: Interval | None


@dataclass(frozen=True)
class ExponentRegression:
    """The linear model log(loss / dense loss) = offset + a * (psi - 1) + b * (nu - 1) + c * omega.

    One unit more of an exponent multiplies the loss by e to its coefficient. R² is NaN where the log ratio is constant,
    or without degrees of freedom.
    """

    psi: Coefficient
    nu: Coefficient
    omega: Coefficient
    offset: Coefficient
    r_squared: float
    points: int


def regress_on_exponents(
    psi: ArrayLike, nu: ArrayLike, omega: ArrayLike, loss: ArrayLike, dense_loss: ArrayLike, *, level: float = 0.95
) -> ExponentRegression:
    """Regress the log loss at a common compute on psi, nu and omega, by least squares.

    The coefficient of an exponent that is constant, or collinear with another one, is NaN; the others stay valid.

    >>> psi, nu, omega = [1, 1, 1, 0.5, 0.75], [1, 0.5, 0.5, 0.5, 0.75], [0, 0.5, 0, 0, 0]
    >>> regression = regress_on_exponents(psi, nu, omega, [1.0, 1.2, 1.0, 1.1, 1.05], dense_loss=1.0)
    >>> [round(coefficient.value, 2) for coefficient in (regression.psi, regression.nu, regression.omega)]
    [-0.19, 0.0, 0.36]

    Args:
        psi, nu, omega, loss: exponents and loss of every structure, each (points,).
        dense_loss: the dense loss at the same compute, one number or (points,); both losses less an assumed floor.
        level: confidence level of the intervals.

    Raises:
        ValueError: the arrays differ in length, a number is not finite, or a loss is not positive.
    """
    loss, dense_loss = np.asarray(loss, dtype=float), np.asarray(dense_loss, dtype=float)
    exponents = [np.asarray(values, dtype=float) for values in (psi, nu, omega)]
    shapes = [values.shape for values in (*exponents, loss)]
    if loss.ndim != 1 or not loss.size or len(set(shapes)) > 1 or dense_loss.shape not in ((), loss.shape):
        raise ValueError(
            f"psi, nu, omega and loss must be one number for each structure, not of shapes {shapes}; dense_loss must "
            f"be one number, or one for each structure, not of shape {dense_loss.shape}"
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
    residual = float(np.sum((ratio - design @ values) ** 2))
    total = float(np.sum((ratio - ratio.mean()) ** 2))
    # the diagonal of the resolution matrix is 1 for coefficients that are equal in all least-squares solutions
    resolution = np.diag(inverse @ design)
    freedom = len(loss) - round(float(resolution.sum()))
    variance = residual / freedom if freedom else math.nan

    def coefficient(i: int) -> Coefficient:
        if not math.isclose(resolution[i], 1, rel_tol=1e-6):
            return Coefficient(math.nan, math.nan, None)
        value, stderr = float(values[i]), math.sqrt(variance * float(inverse[i] @ inverse[i]))
        return Coefficient(value, stderr, t_interval(value, stderr, freedom, level) if freedom else None)

    r_squared = 1 - residual / total if total and freedom else math.nan
    of_psi, of_nu, of_omega, offset = map(coefficient, range(4))
    return ExponentRegression(of_psi, of_nu, of_omega, offset, r_squared, len(loss))
