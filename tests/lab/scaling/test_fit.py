"""Seeds: averaged, resampled, and intervals that hold the truth about as often as they say."""

from itertools import product

import numpy as np
import pytest

from einlinear_lab.scaling import LossCurves, ScalingFit, fit_scaling

COMPUTE = np.geomspace(1e6, 1e10, 6)


def final_losses(rng: np.random.Generator, seeds: int, sd: float = 0.01) -> list[LossCurves]:
    """Models on 3 C^-0.12, one point each."""
    return [LossCurves(c[None], 3 * c**-0.12 * np.exp(sd * rng.standard_normal((seeds, 1)))) for c in COMPUTE]


def fitted(seeds: int = 4, **options: object) -> ScalingFit:
    return fit_scaling(final_losses(np.random.default_rng(0), seeds), **{"resamples": 50} | options)  # type: ignore[arg-type]


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    hits = np.zeros(3)
    for seed in range(200):
        fit = fit_scaling(final_losses(np.random.default_rng(seed), seeds=5), resamples=39, seed=seed)
        found = [fit.interval("exponent"), fit.interval("scale"), fit.predict(1e12).interval]
        truths = (0.12, 3.0, 3 * 1e12**-0.12)
        hits += [i is not None and i.low <= truth <= i.high for i, truth in zip(found, truths, strict=True)]
    assert (hits / 200 >= 0.88).all(), hits
    assert (hits / 200 <= 0.99).all(), hits


def test_the_same_seed_gives_the_same_intervals() -> None:
    assert fitted(seed=1).interval("exponent") == fitted(seed=1).interval("exponent")
    assert fitted(seed=1).interval("exponent") != fitted(seed=2).interval("exponent")


def test_seeds_are_averaged() -> None:
    mean = [
        LossCurves(curve.compute, curve.losses.mean(0, keepdims=True))
        for curve in final_losses(np.random.default_rng(3), 4)
    ]
    assert fit_scaling(final_losses(np.random.default_rng(3), 4), resamples=0).law == fit_scaling(mean).law


def test_every_model_draws_one_seed_less_than_it_has_by_itself() -> None:
    curves = [LossCurves(np.array([c]), np.array([[1.0], [1.001]]) / c) for c in (1.0, 10.0, 100.0)]
    draws = fit_scaling(curves, resamples=90).draws
    drawn = {tuple((draw.frontier.loss * draw.frontier.compute).round(4)) for draw in draws}
    assert drawn == {*product((1.0, 1.001), repeat=3)}


def test_one_seed_says_nothing_about_seeds() -> None:
    fit = fitted(seeds=1)
    assert fit.interval("exponent") is None
    assert fit.predict(1e12).interval is None
    interval = fit.interval("exponent", "regression")
    assert interval is not None
    assert interval.source == "regression"
    assert interval.low < fit.law.exponent < interval.high
    prediction = fit.predict(1e12, "regression")
    assert prediction.loss == fit.law(1e12)
    assert prediction.interval is not None
    assert prediction.interval.low < prediction.loss < prediction.interval.high


def test_one_model_of_one_seed_is_enough_to_say_nothing() -> None:
    first, *others = final_losses(np.random.default_rng(3), 3)
    fit = fit_scaling([LossCurves(first.compute, first.losses[:1]), *others])
    assert fit.draws == ()


def test_a_prediction_is_less_sure_the_farther_it_is() -> None:
    for source in ("seeds", "regression"):
        near, far = (fitted().predict(compute, source).interval for compute in (1e8, 1e14))  # type: ignore[arg-type]
        assert near is not None
        assert far is not None
        assert far.high / far.low > 1.5 * (near.high / near.low - 1) + 1


def test_which_curve_a_point_of_the_frontier_is_of() -> None:
    small = LossCurves(np.array([1.0, 2.0, 4.0]), np.array([[8.0, 5.5, 5.4]]))
    large = LossCurves(np.array([4.0, 16.0]), np.array([[9.0, 2.0]]))
    fit = fit_scaling([small, large])
    assert fit.frontier.index.tolist() == [0, 1, 4]
    assert fit.curve.tolist() == [0, 0, 1]


def test_a_floor_can_be_assumed_or_fitted() -> None:
    rng = np.random.default_rng(3)
    curves = [LossCurves(c[None], 1.5 + 200 * c**-0.3 + 0.003 * rng.standard_normal((3, 1))) for c in COMPUTE]
    assert fit_scaling(curves, floor=1.5, resamples=0).law.exponent == pytest.approx(0.3, abs=0.01)
    fit = fit_scaling(curves, floor=None, resamples=40)
    assert fit.law.floor_identified
    interval = fit.interval("floor")
    assert interval is not None
    assert interval.low < 1.5 < interval.high
    assert 0 < interval.high - interval.low < 0.05


def test_resamples_too_poor_for_a_law_are_left_out() -> None:
    """The second model is better than the first in one of two seeds only."""
    losses = {0.1: [[9.0], [9.0]], 1.0: [[2.0], [2.0]], 2.0: [[1.9], [2.05]]}
    curves = [LossCurves(np.array([c]), np.array(own)) for c, own in losses.items()]
    fit = fit_scaling(curves, tolerance=1e9, resamples=100)
    assert 30 < len(fit.draws) < 70


def test_bad_curves() -> None:
    good = LossCurves(np.array([1.0]), np.array([[2.0]]))
    with pytest.raises(ValueError, match="there are no models"):
        fit_scaling([])
    with pytest.raises(ValueError, match="at least 3 points on the frontier, since any 2 lie on one, but there is 1"):
        fit_scaling([good])
    with pytest.raises(ValueError, match="but there are 2: train models of more sizes, or widen the window"):
        fit_scaling([LossCurves(np.array([1.0, 2, 3]), np.array([[6.0, 3, 2]]))], window=(1.5, 4))
    with pytest.raises(ValueError, match="at least 4 points on the frontier, since any 3 lie on one, but there are 3"):
        fit_scaling([LossCurves(np.array([1.0, 2, 3]), np.array([[6.0, 3, 2]]))], floor=None)
    with pytest.raises(ValueError, match=r"curve 1 has compute of shape \(1,\) and losses of shape \(1,\)"):
        fit_scaling([good, LossCurves(np.array([1.0]), np.array([2.0]))])
    with pytest.raises(ValueError, match="point 1 has nan"):
        fit_scaling([good, LossCurves(np.array([2.0]), np.array([[np.nan]]))])
