"""The regression on psi, nu and omega finds the coefficients that losses were made with."""

import math

import numpy as np
import pytest

from einlinear_lab.scaling import regress_on_exponents

PSI = np.array([1, 1, 1, 1, 0.5, 0.75, 0.75, 1, 1])
NU = np.array([1, 0.5, 0.5, 0.75, 0.5, 0.75, 0.25, 0.75, 0.25])
OMEGA = np.array([0, 0.5, 0, 0.25, 0, 0, 0, 0, 0.5])
TRUE = {"psi": -0.4, "nu": 0.05, "omega": 0.6, "offset": 0.02}
DENSE = np.linspace(2, 3, 9)


def losses(sd: float = 0.0, seed: int = 0) -> np.ndarray:
    noise = sd * np.random.default_rng(seed).standard_normal(9)
    return DENSE * np.exp(-0.4 * (PSI - 1) + 0.05 * (NU - 1) + 0.6 * OMEGA + 0.02 + noise)


def test_known_effects() -> None:
    regression = regress_on_exponents(PSI, NU, OMEGA, losses(), DENSE)
    assert {name: getattr(regression, name).value for name in TRUE} == pytest.approx(TRUE)
    assert regression.r_squared == pytest.approx(1)
    assert regression.points == 9


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    hits = dict.fromkeys(TRUE, 0)
    for seed in range(400):
        regression = regress_on_exponents(PSI, NU, OMEGA, losses(0.05, seed), DENSE)
        for name, truth in TRUE.items():
            interval = getattr(regression, name).interval
            hits[name] += interval.low <= truth <= interval.high
    assert all(0.92 <= count / 400 <= 0.98 for count in hits.values()), hits


def test_an_exponent_that_never_changes_has_no_known_effect() -> None:
    same = OMEGA == 0
    regression = regress_on_exponents(PSI[same], NU[same], OMEGA[same], losses()[same], DENSE[same])
    assert math.isnan(regression.omega.value)
    assert regression.omega.interval is None
    assert regression.psi.value == pytest.approx(-0.4)
    assert regression.psi.interval is not None  # six points, three coefficients


def test_exponents_that_change_together_are_not_told_apart() -> None:
    regression = regress_on_exponents([1, 0.5, 0.75, 1], [1, 0.5, 0.75, 1], [0, 0, 0, 0.5], [1.0, 1.2, 1.1, 1.3], 1.0)
    assert math.isnan(regression.psi.value)
    assert math.isnan(regression.nu.value)
    assert regression.omega.value == pytest.approx(math.log(1.3) / 0.5, abs=0.01)


def test_as_many_coefficients_as_points_leave_no_interval() -> None:
    regression = regress_on_exponents([1, 0.5], [1, 1], [0, 0], [1.0, 1.2], 1.0)
    assert regression.psi.value == pytest.approx(math.log(1.2) / -0.5)
    assert regression.psi.interval is None
    assert math.isnan(regression.psi.stderr)
    assert math.isnan(regression.r_squared)


@pytest.mark.parametrize(
    ("loss", "dense", "says"),
    [
        ([1.0], 1.0, "must be one number for each structure"),
        ([1.0, 2.0], [1.0], r"dense_loss .* not of shape \(1,\)"),
        ([1.0, math.nan], 1.0, "must be finite"),
        ([1.0, 2.0], 0.0, "positive, but the lowest is 0"),
    ],
)
def test_bad_arguments(loss: list[float], dense: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        regress_on_exponents([1, 0.5], [1, 1], [0, 0], loss, dense)  # type: ignore[arg-type]
