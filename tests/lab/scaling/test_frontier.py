"""The Pareto frontier: its rules on points made by hand, and what holds for any points."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einlinear_lab.scaling import Frontier, pareto_frontier, power_law, power_law_with_floor

# a coarse grid, so that points repeat, share their compute or their loss, and lie on lines
POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(-6, 6)), min_size=1, max_size=25).map(
    lambda steps: (np.exp(1.3 * np.array(steps)[:, 0]), np.exp(0.11 * np.array(steps)[:, 1]))
)
TOLERANCES = st.sampled_from([0.0, 0.02, 0.3])


def kept(compute: list[float], loss: list[float], **options: object) -> list[int]:
    return pareto_frontier(compute, loss, **options).index.tolist()  # type: ignore[arg-type]


def test_points_hardly_above_the_hull_belong_to_it() -> None:
    middle = math.sqrt(8 * 2)  # on the line from the first to the last
    for share, belongs in ((0.019, True), (0.021, False)):
        assert (1 in kept([1, 10, 100], [8, middle * (1 + share), 2])) == belongs
    assert 1 in kept([1, 10, 100], [8, middle * 1.04, 2], tolerance=0.05)


def test_points_where_the_loss_rises_are_dropped() -> None:
    assert kept([1, 10, 100, 1000], [8, 4, 2, 2.01]) == [0, 1, 2]  # more compute than the best
    assert kept([1, 10, 100], [2.0, 2.01, 1.98]) == [0, 2]  # near the hull, but worse than with less compute
    assert kept([1, 10, 100], [2.0, 2.0, 1.98]) == [0, 2]  # no better either


def test_points_come_back_by_compute_with_their_index() -> None:
    frontier = pareto_frontier([100, 1, 10, 10], [2.0, 8.0, 7.0, 4.0])
    assert frontier.index.tolist() == [1, 3, 0]
    assert frontier.compute.tolist() == [1, 10, 100]
    assert frontier.loss.tolist() == [8, 4, 2]


def test_the_floor_is_subtracted_before_the_hull_is_taken() -> None:
    compute, loss = [1, 10, 100], [2.0, 1.33, 1.1]
    assert kept(compute, loss) == [0, 1, 2]
    assert kept(compute, loss, floor=1.0) == [0, 2]  # 0.33 is 4 % above the line from 1 to 0.1
    assert pareto_frontier(compute, loss, floor=1.0).loss.tolist() == [2.0, 1.1]  # as given


def test_the_window_selects_from_the_frontier_of_all_points() -> None:
    compute, loss = [1, 10, 20, 100], [8, 4, 3.9, 2]
    assert kept(compute, loss) == [0, 1, 3]
    assert kept(compute, loss, window=(5, 50)) == [1]
    assert kept(compute, loss, window=(10, 100)) == [1, 3]
    assert kept(compute, loss, window=(200, 300)) == []


def test_pruning_takes_the_runs_that_were_not_finished() -> None:
    compute = np.geomspace(1, 1e6, 7)
    loss = 8 * compute**-0.1
    loss[5:] = loss[4] * np.array([0.99, 0.985])
    assert kept(compute.tolist(), loss.tolist()) == [0, 1, 2, 3, 4, 5, 6]
    assert kept(compute.tolist(), loss.tolist(), prune=True) == [0, 1, 2, 3, 4]
    convex = 1 + 8 * compute**-0.1  # every point less explains more
    assert kept(compute.tolist(), convex.tolist(), prune=True) == [0, 1, 2]


@pytest.mark.parametrize(
    ("compute", "loss", "index"),
    [
        ([5], [1], [0]),
        ([1, 2], [2, 1], [0, 1]),
        ([1, 2], [1, 2], [0]),
        ([1, math.e], [1, math.e], [0]),
        ([3, 3, 3], [2, 2, 2], [0]),
        ([3, 3], [2, 1], [1]),
        ([1, 1, 10, 10], [4, 4, 2, 2], [0, 2]),
        ([1, 10, 100, 1000], [8, 4, 2, 1], [0, 1, 2, 3]),
        ([1, 1 + 1e-15], [1, 1 - 1e-15], [0, 1]),
    ],
)
def test_few_points_repeated_points_points_on_a_line(compute: list[float], loss: list[float], index: list[int]) -> None:
    assert kept(compute, loss, tolerance=0.0) == index


def test_bad_arguments() -> None:
    for bad in ([math.nan, 1], [math.inf, 1], [0, 1], [-1, 1]):
        with pytest.raises(ValueError, match="loss must be finite and above 0, but point 0"):
            pareto_frontier([1, 2], bad)
        with pytest.raises(ValueError, match="compute must be finite and above 0, but point 0"):
            pareto_frontier(bad, [1, 2])
    with pytest.raises(ValueError, match="above 2, but point 1 has 2"):
        pareto_frontier([1, 2], [3, 2], floor=2)
    with pytest.raises(ValueError, match="tolerance is a share"):
        pareto_frontier([1, 2], [2, 1], tolerance=-0.1)
    with pytest.raises(ValueError, match="from the least to the most compute"):
        pareto_frontier([1, 2], [2, 1], window=(2, 1))


def test_the_loss_between_points() -> None:
    frontier = Frontier(np.arange(2), np.array([1.0, 100.0]), np.array([8.0, 2.0]))
    np.testing.assert_allclose(frontier.loss_at([0.5, 1, 10, 100, 1e6]), [math.inf, 8, 4, 2, 2])


@given(POINTS, TOLERANCES)
def test_never_above_any_point_by_more_than_the_tolerance(points: tuple[np.ndarray, np.ndarray], by: float) -> None:
    compute, loss = points
    frontier = pareto_frontier(compute, loss, tolerance=by)
    assert (frontier.loss_at(compute) <= loss * (1 + by) * (1 + 1e-6)).all()
    assert (np.diff(frontier.compute) > 0).all()
    assert (np.diff(frontier.loss) < 0).all()
    np.testing.assert_array_equal(frontier.compute, compute[frontier.index])
    np.testing.assert_array_equal(frontier.loss, loss[frontier.index])


@given(POINTS)
def test_without_tolerance_it_is_convex(points: tuple[np.ndarray, np.ndarray]) -> None:
    frontier = pareto_frontier(*points, tolerance=0.0)
    slopes = np.diff(np.log(frontier.loss)) / np.diff(np.log(frontier.compute))
    assert (np.diff(slopes) > -1e-6).all()


@given(POINTS, TOLERANCES, st.sampled_from([1e-9, 2.0, 6e3, 1e15]))
def test_units_do_not_matter(points: tuple[np.ndarray, np.ndarray], by: float, unit: float) -> None:
    compute, loss = points
    expected = pareto_frontier(compute, loss, tolerance=by).index
    np.testing.assert_array_equal(pareto_frontier(compute * unit, loss, tolerance=by).index, expected)
    np.testing.assert_array_equal(pareto_frontier(compute, loss * unit, tolerance=by).index, expected)


@given(POINTS, TOLERANCES, st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(points: tuple[np.ndarray, np.ndarray], by: float, random) -> None:  # type: ignore[no-untyped-def]
    compute, loss = points
    order = list(range(len(compute)))
    random.shuffle(order)
    expected, found = (
        pareto_frontier(compute, loss, tolerance=by),
        pareto_frontier(compute[order], loss[order], tolerance=by),
    )
    np.testing.assert_array_equal(found.compute, expected.compute)
    np.testing.assert_array_equal(found.loss, expected.loss)


@pytest.mark.parametrize("floor", [0.0, 1.7])
def test_the_envelope_of_training_curves(floor: float) -> None:
    """Curves over tokens of widths N: floor + 30 N^-0.3 + 30 (C / N)^-0.3. The best N for C is its root, where both
    terms are 30 C^-0.15."""
    widths = np.geomspace(1e4, 1e7, 10)
    compute = np.concatenate([width * np.geomspace(1e3, 1e8, 60) for width in widths])
    width = np.repeat(widths, 60)
    loss = floor + 30 * width**-0.3 + 30 * (compute / width) ** -0.3
    frontier = pareto_frontier(compute, loss, floor=floor, window=(2e8, 5e13))
    assert set(width[frontier.index]) == set(widths)
    law = power_law(frontier.compute, frontier.loss, floor=floor)
    assert law.exponent == pytest.approx(0.15, rel=0.01)
    assert law(1e15) == pytest.approx(floor + 60 * 1e15**-0.15, rel=0.03)
    fitted = power_law_with_floor(frontier.compute, frontier.loss)
    assert fitted.floor == pytest.approx(floor, abs=0.02)
    assert fitted.exponent == pytest.approx(0.15, rel=0.03)
    everything = power_law(compute, loss, floor=floor)
    assert everything(1e10) - floor > 1.1 * (law(1e10) - floor)  # the frontier is needed
