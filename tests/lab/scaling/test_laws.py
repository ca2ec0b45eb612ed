"""Power laws: the numbers that data was made with are found again, and what data does not say is not claimed."""

import math

import numpy as np
import pytest

from einlinear_lab.scaling import power_law, power_law_with_floor
from einlinear_lab.scaling.laws import law_interval, prediction_interval

COMPUTE = np.geomspace(1e6, 1e12, 10)


def noisy(floor: float, sd: float, seed: int = 0) -> np.ndarray:
    return (floor + 200 * COMPUTE**-0.3) * np.exp(sd * np.random.default_rng(seed).standard_normal(len(COMPUTE)))


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_an_assumed_floor_is_subtracted(floor: float) -> None:
    law = power_law(COMPUTE, noisy(floor, 0.0), floor=floor)
    assert (law.exponent, law.scale, law.r_squared) == pytest.approx((0.3, 200, 1))
    assert (law.floor, law.floor_identified) == (floor, None)
    assert law(1e14) == pytest.approx(floor + 200 * 1e14**-0.3)
    np.testing.assert_allclose(law(COMPUTE), noisy(floor, 0.0))


def test_an_assumed_floor_that_is_wrong_does_not_fit() -> None:
    assert power_law(COMPUTE, noisy(1.5, 0.0)).r_squared < 0.95


@pytest.mark.parametrize("floor", [0.05, 1.5, 40.0])
def test_the_floor_is_found(floor: float) -> None:
    law = power_law_with_floor(COMPUTE, noisy(floor, 0.0))
    assert (law.floor, law.exponent, law.scale) == pytest.approx((floor, 0.3, 200), rel=1e-4)
    assert law.floor_identified
    assert law.stderr < 1e-5
    assert law.r_squared == pytest.approx(1)


def test_an_outlier_hardly_moves_the_floor() -> None:
    loss = noisy(1.5, 0.0)
    loss[4] *= 1.3
    assert power_law_with_floor(COMPUTE, loss).floor == pytest.approx(1.5, rel=0.02)


def test_no_floor_is_not_taken_for_one() -> None:
    for seed in range(5):
        law = power_law_with_floor(COMPUTE, noisy(0.0, 0.01, seed))
        assert law.floor_identified is False
        assert law.exponent == pytest.approx(0.3, rel=0.05)


def test_a_flat_curve_does_not_say_its_floor() -> None:
    loss = 1.5 * np.exp(0.01 * np.random.default_rng(1).standard_normal(10))
    assert power_law_with_floor(COMPUTE, loss).floor_identified is False


def test_a_curve_that_has_reached_its_floor_says_it() -> None:
    """Half of the points there have a loss below the floor."""
    loss = (1.5 + 3 * (COMPUTE / 1e6) ** -0.8) * np.exp(0.01 * np.random.default_rng(1).standard_normal(10))
    law = power_law_with_floor(COMPUTE, loss)
    assert law.floor_identified
    assert law.floor > loss.min()
    assert law.floor == pytest.approx(1.5, rel=0.01)


def test_an_exponent_that_nothing_says_has_no_small_standard_error() -> None:
    """All points but the first, and a trace of the second, are on the floor."""
    loss = (1.5 + 2 * (COMPUTE / 1e6) ** -8.0) * np.exp(0.01 * np.random.default_rng(2).standard_normal(10))
    law = power_law_with_floor(COMPUTE, loss)
    assert law.floor == pytest.approx(1.5, rel=0.01)
    assert law.stderr > 10


def test_a_start_nearby_finds_the_same_floor() -> None:
    loss = noisy(1.5, 0.01)
    found = power_law_with_floor(COMPUTE, loss)
    for near in (1.2, 99.0):
        assert power_law_with_floor(COMPUTE, loss, near=near).floor == pytest.approx(found.floor, rel=1e-3)


@pytest.mark.parametrize("fit", [power_law, power_law_with_floor])
@pytest.mark.parametrize(
    ("compute", "loss", "says"),
    [
        ([], [], "at least one"),
        ([1.0, 2.0], [1.0], r"shapes \(2,\) and \(1,\)"),
        ([[1.0]], [[1.0]], "one length"),
        ([1.0, math.nan], [2.0, 1.0], "compute must be finite and above 0, but point 1 has nan"),
        ([1.0, 0.0], [2.0, 1.0], "compute must be finite"),
        ([1.0, 2.0], [2.0, math.inf], "loss must be finite and above 0, but point 1 has inf"),
        ([1.0, 2.0], [-2.0, 1.0], "loss must be finite"),
        ([3.0, 3.0], [2.0, 1.0], "different computes, got 1"),
    ],
)
def test_bad_points(fit: object, compute: list[float], loss: list[float], says: str) -> None:
    assert callable(fit)
    with pytest.raises(ValueError, match=says):
        fit(compute, loss)


def test_a_loss_below_the_floor() -> None:
    with pytest.raises(ValueError, match=r"above 1\.5, but point 1 has 1\.4"):
        power_law([1, 2], [2.0, 1.4], floor=1.5)


def test_three_points_do_not_fit_three_numbers() -> None:
    with pytest.raises(ValueError, match="at least 4 different computes, got 3"):
        power_law_with_floor([1, 2, 3, 3], [4, 3, 2, 2])


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_regression_intervals_hold_the_truth_as_often_as_they_say(floor: float) -> None:
    """Where the points are independent around the law."""
    truth = {"exponent": 0.3, "scale": 200.0, "prediction": floor + 200 * 1e13**-0.3}
    hits = dict.fromkeys(truth, 0)
    for seed in range(300):
        loss = floor + 200 * COMPUTE**-0.3 * np.exp(0.02 * np.random.default_rng(seed).standard_normal(10))
        law = power_law(COMPUTE, loss, floor=floor)
        found = {
            "exponent": law_interval(law, COMPUTE, loss, "exponent"),
            "scale": law_interval(law, COMPUTE, loss, "scale"),
            "prediction": prediction_interval(law, COMPUTE, loss, 1e13),
        }
        for name, interval in found.items():
            assert interval is not None
            assert interval.source == "regression"
            hits[name] += interval.low <= truth[name] <= interval.high
    for name, count in hits.items():
        assert 0.92 <= count / 300 <= 0.98, name


def test_the_interval_of_a_fitted_floor_holds_it() -> None:
    hits = 0
    for seed in range(40):
        loss = noisy(1.5, 0.01, seed)
        interval = law_interval(power_law_with_floor(COMPUTE, loss), COMPUTE, loss, "floor")
        assert interval is not None
        assert interval.high - interval.low < 0.2
        hits += interval.low <= 1.5 <= interval.high
    assert hits / 40 >= 0.85


def test_a_law_through_all_its_points_has_no_interval() -> None:
    law = power_law([1, 10], [2.0, 1.0])
    assert law_interval(law, [1, 10], [2.0, 1.0], "exponent") is None
    assert prediction_interval(law, [1, 10], [2.0, 1.0], 100) is None
    assert math.isnan(law.stderr)


def test_the_interval_of_the_slope_is_the_textbook_one() -> None:
    """Checked by hand: y = (0, 1, 1) over x = (0, 1, 2) has slope 1/2, its standard error is sqrt(1/6 / 2)."""
    law = power_law(np.exp([0, 1, 2]), np.exp([0, 1, 1]))
    interval = law_interval(law, np.exp([0, 1, 2]), np.exp([0, 1, 1]), "exponent")
    assert interval is not None
    assert law.stderr == pytest.approx(math.sqrt(1 / 12))
    assert interval.high + 0.5 == pytest.approx(12.706 * math.sqrt(1 / 12), rel=1e-4)  # t of 97.5 %, one degree
    with pytest.raises(ValueError, match="between 0 and 1"):
        law_interval(law, np.exp([0, 1, 2]), np.exp([0, 1, 1]), "exponent", level=95)
