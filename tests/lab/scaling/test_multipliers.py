"""Compute multipliers along frontiers whose laws are known."""

import math

import numpy as np
import pytest

from einlinear_lab.scaling import LossCurves, ScalingFit, fit_scaling, multipliers_along

COMPUTE = np.geomspace(1e6, 1e10, 9)
MIDDLE = 5  # of ten places


def fit(times: float, seeds: int = 4, sd: float = 0.01, seed: int = 0, compute: np.ndarray = COMPUTE) -> ScalingFit:
    """Models as good as dense ones of `times` the compute."""
    rng = np.random.default_rng(seed)
    losses = [3 * (times * c) ** -0.12 * np.exp(sd * rng.standard_normal((seeds, 1))) for c in compute]
    return fit_scaling([LossCurves(c[None], loss) for c, loss in zip(compute, losses)], resamples=39, seed=seed)


def test_a_known_multiplier_at_every_compute_of_the_overlap() -> None:
    found = multipliers_along(fit(2, sd=0), fit(1, sd=0, compute=COMPUTE * 10))
    np.testing.assert_allclose([at.compute for at in found], np.geomspace(1e7, 1e10, 10))
    for at in found:
        assert at.multiplier.value == pytest.approx(2)
        assert at.multiplier.bound == ""
        assert at.loss == pytest.approx(3 * (2 * at.compute) ** -0.12)
        assert at.interval is not None
        assert (at.interval.low, at.interval.high) == pytest.approx((2, 2))


def test_bounds_where_the_dense_curve_ends() -> None:
    above = multipliers_along(fit(8, sd=0), fit(1, sd=0))[-2]  # at 3.6e9, where dense needs 2.9e10 and ends at 1e10
    assert (above.multiplier.bound, above.multiplier.value) == (">", pytest.approx(1e10 / above.compute))
    assert above.interval is not None
    assert (above.interval.low, above.interval.high) == (pytest.approx(1e10 / above.compute), math.inf)
    below = multipliers_along(fit(1 / 8, sd=0), fit(1, sd=0))[1]  # at 2.8e6, where dense needs 3.5e5 and begins at 1e6
    assert (below.multiplier.bound, below.multiplier.value) == ("<", pytest.approx(1e6 / below.compute))
    assert below.interval is not None
    assert (below.interval.low, below.interval.high) == (0, pytest.approx(1e6 / below.compute))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    hits, width = 0, []
    for seed in range(60):
        dense, other = fit(1, seeds=6, seed=2 * seed), fit(2, seeds=6, seed=2 * seed + 1)
        at = multipliers_along(other, dense)[MIDDLE]
        assert at.interval is not None
        hits += at.interval.low <= 2 <= at.interval.high
        width.append(at.interval.high - at.interval.low)
    assert hits / 60 >= 0.85
    assert 0.1 < np.mean(width) < 0.6


def test_draws_of_the_two_are_independent() -> None:
    """Also of the same curves with the same seed: a structure that is dense's equal is not known to be."""
    at = multipliers_along(fit(1), fit(1))[MIDDLE]
    assert at.multiplier.value == pytest.approx(1)
    assert at.interval is not None
    assert at.interval.low < 0.99
    assert at.interval.high > 1.01


def test_one_seed_gives_no_interval() -> None:
    at = multipliers_along(fit(2, seeds=1), fit(1))[MIDDLE]
    assert at.interval is None
    assert at.multiplier.value == pytest.approx(2, rel=0.3)


def test_nothing_in_common() -> None:
    assert multipliers_along(fit(1), fit(1, compute=COMPUTE * 1e6)) == ()
