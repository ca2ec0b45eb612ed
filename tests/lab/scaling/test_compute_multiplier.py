"""Compute multipliers against a dense curve whose law is known, and what several seeds make of them."""

import math
from itertools import pairwise

import pytest

from einlinear_lab.scaling import Multiplier, compute_multiplier, multiplier_over_seeds

EXPONENT, SCALE = 0.12, 2.0
MACS = (1e4, 3e4, 1e5, 2e5, 1e6)


def law(macs: float) -> float:
    return SCALE * macs**-EXPONENT


DENSE = [(macs, law(macs)) for macs in MACS]


def assert_recovers(multiplier: object, times: float, macs: float) -> None:
    """A structure that is `times` as good as the dense law has this multiplier, wherever it lies on the curve."""
    assert callable(multiplier)
    assert multiplier(DENSE, macs, law(times * macs)).value == pytest.approx(times)


@pytest.mark.parametrize("times", [0.25, 1.0, 3.7])
@pytest.mark.parametrize("macs", [4.1e4, 1e5, 2.2e5])
def test_recovers_a_known_multiplier(times: float, macs: float) -> None:
    assert_recovers(compute_multiplier, times, macs)
    assert compute_multiplier(DENSE, macs, law(times * macs)).bound == ""


def test_wrong_formulas_are_noticed() -> None:
    def linear(dense: list[tuple[float, float]], macs: float, loss: float) -> Multiplier:  # not in log-log space
        for (m0, l0), (m1, l1) in pairwise(dense):
            if l1 <= loss <= l0:
                return Multiplier((m0 + (l0 - loss) / (l0 - l1) * (m1 - m0)) / macs)
        raise AssertionError

    def loss_ratio(dense: list[tuple[float, float]], macs: float, loss: float) -> Multiplier:
        return Multiplier(law(macs) / loss)

    for wrong in (linear, loss_ratio):
        with pytest.raises(AssertionError):
            assert_recovers(wrong, 3.7, 4.1e4)


def test_the_order_of_the_dense_points_does_not_matter() -> None:
    loss = law(2.5e5)
    assert compute_multiplier(DENSE[::-1], 1e5, loss) == compute_multiplier(DENSE, 1e5, loss)


def test_every_dense_point_has_multiplier_one() -> None:
    assert all(compute_multiplier(DENSE, macs, loss) == Multiplier(pytest.approx(1.0)) for macs, loss in DENSE)


def test_beyond_the_dense_curve_there_are_bounds_only() -> None:
    assert compute_multiplier(DENSE, 2e5, law(1e6) - 0.01) == Multiplier(1e6 / 2e5, ">")
    assert compute_multiplier(DENSE, 2e4, law(1e4) + 0.01) == Multiplier(1e4 / 2e4, "<")


def test_a_bump_in_the_dense_curve_counts_where_it_first_reaches_the_loss() -> None:
    bumpy = [(100.0, 0.8), (200.0, 0.4), (400.0, 0.5), (800.0, 0.3)]
    assert compute_multiplier(bumpy, 100.0, 0.4).value == pytest.approx(2)
    assert compute_multiplier(bumpy, 100.0, 0.45).value == pytest.approx(2 ** (math.log(0.8 / 0.45) / math.log(2)))


def test_a_single_dense_point() -> None:
    assert compute_multiplier([(100.0, 0.5)], 50.0, 0.5) == Multiplier(2.0)
    assert compute_multiplier([(100.0, 0.5)], 50.0, 0.4) == Multiplier(2.0, ">")
    with pytest.raises(ValueError, match="at least one point"):
        compute_multiplier([], 50.0, 0.4)


def test_spread_is_a_geometric_mean_with_its_range() -> None:
    found = multiplier_over_seeds([Multiplier(4.0), Multiplier(1.0), Multiplier(2.0)])
    assert found is not None
    assert found.mean == Multiplier(pytest.approx(2.0))
    assert (found.smallest, found.largest, found.seeds) == (Multiplier(1.0), Multiplier(4.0), 3)
    assert str(found) == "2.00× (1.00 to 4.00)"


def test_bounds_stay_bounds_in_a_mean() -> None:
    below, above, exact = Multiplier(2.0, "<"), Multiplier(8.0, ">"), Multiplier(4.0)
    assert str(multiplier_over_seeds([exact, above])).startswith("> 5.66×")
    assert str(multiplier_over_seeds([exact, below])).startswith("< 2.83×")
    assert str(multiplier_over_seeds([above])) == "> 8.00×"
    assert str(multiplier_over_seeds([below, above])) == "seeds disagree (< 2.00 to > 8.00)"
    # one dense model: some seeds are better, some are worse
    assert (
        str(multiplier_over_seeds([Multiplier(1.07, ">"), Multiplier(1.07, "<")]))
        == "seeds disagree (< 1.07 to > 1.07)"
    )
    assert multiplier_over_seeds([]) is None
