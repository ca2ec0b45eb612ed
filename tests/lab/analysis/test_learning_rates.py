"""Best learning rates: of parabolas whose vertex is known."""

import math
from pathlib import Path

import pytest
from tests.lab.made_up import run_of, write

from einlinear_lab.analysis.comparison import TRAIN_LOSS, Comparison, compare_runs
from einlinear_lab.analysis.learning_rates import (
    LearningRateSweep,
    Optimum,
    along,
    best_lr,
    common_lr,
    optimum_shift,
    sweeps_of,
    swept_curves,
    varied_size,
)
from einlinear_lab.scaling.compute_multipliers import Bound

RATES = (1e-3, 2e-3, 6e-3, 1e-2)  # not equally far apart


def bowl(best: float) -> list[tuple[float, float | None]]:
    return [(lr, 1 + 0.3 * math.log(lr / best) ** 2) for lr in RATES]


@pytest.mark.parametrize("best", [1.7e-3, 2e-3, 3.5e-3, 7e-3])
def test_the_vertex_of_a_parabola_in_the_logarithm(best: float) -> None:
    found = best_lr(bowl(best)[::-1])
    assert found is not None
    assert found == (pytest.approx(best), "")


def test_at_an_end_there_is_a_bound_only() -> None:
    assert best_lr(bowl(2e-4)) == (1e-3, "<")
    assert best_lr(bowl(5e-2)) == (1e-2, ">")


def test_beside_divergence_it_is_the_lowest_point_itself() -> None:
    assert best_lr([*bowl(1e-1), (3e-2, None)]) == (1e-2, "")
    assert best_lr([(lr, None) for lr in RATES]) is None


def comparison(folder: Path, best: dict[int, tuple[float, float]]) -> Comparison:
    """A comparison of two seeds; width -> the best learning rate of each."""
    records = [
        write(folder, run_of("btt", width, seed, lr=lr), 100 * width, loss)
        for width, of_seeds in best.items()
        for seed, own in enumerate(of_seeds)
        for lr, loss in bowl(own)
    ]
    (found,) = compare_runs(records)
    return found


def test_optima_of_every_width_with_their_spread(tmp_path: Path) -> None:
    found = comparison(tmp_path, {16: (3e-3, 3e-3), 64: (2e-3, 4.5e-3)})
    narrow, wide = sweeps_of(found, found.curves[0], TRAIN_LOSS)
    assert (narrow.name, wide.name) == ("width 16", "width 64")
    assert narrow.optimum is not None
    assert wide.optimum is not None
    assert [narrow.optimum.lr, narrow.optimum.smallest, narrow.optimum.largest] == 3 * [pytest.approx(3e-3)]
    assert wide.optimum.lr == pytest.approx(3e-3)  # the mean of two parabolas has its vertex in between
    assert (wide.optimum.smallest, wide.optimum.largest) == (pytest.approx(2e-3), pytest.approx(4.5e-3))
    times = optimum_shift([narrow, wide])
    assert times is not None
    assert times.text == "1.00"
    assert optimum_shift([narrow]) is None


def test_the_rate_that_serves_all_sizes_costs_its_worst_excess(tmp_path: Path) -> None:
    found = comparison(tmp_path, {16: (2e-3, 2e-3), 64: (6e-3, 6e-3)})
    sweeps = sweeps_of(found, found.curves[0], TRAIN_LOSS)
    # both inner rates are best at one size, and a factor of three from the best at the other
    assert common_lr(sweeps, TRAIN_LOSS) in [(lr, pytest.approx(0.3 * math.log(3) ** 2)) for lr in (2e-3, 6e-3)]
    assert common_lr(sweeps[:1], TRAIN_LOSS) is None


def test_a_rate_that_diverges_at_one_size_serves_none(tmp_path: Path) -> None:
    records = [
        write(tmp_path, run_of("btt", width, lr=lr), 100 * width, None if lr in diverging else loss)
        for width, diverging in ((16, {2e-3, 1e-2}), (64, {6e-3}))
        for lr, loss in bowl(3e-3)
    ]
    (found,) = compare_runs(records)
    lr, _ = common_lr(sweeps_of(found, found.curves[0], TRAIN_LOSS), TRAIN_LOSS) or (None, None)
    assert lr == 1e-3


@pytest.mark.parametrize(
    ("optima", "expected"),
    [
        ([(1e-3, ""), (4e-3, "")], "4.00"),
        ([(1e-3, "<"), (4e-3, "")], "> 4.00"),
        ([(1e-3, ""), (4e-3, ">")], "> 4.00"),
        ([(1e-3, ""), (2e-3, ">"), (4e-3, "")], "> 4.00"),
        ([(1e-3, ">"), (4e-3, "")], None),
        ([(1e-3, ""), (4e-3, "<")], None),
        ([(4e-3, ">"), (4e-3, ">")], None),
    ],
)
def test_optima_at_an_end_of_the_rates_tell_at_most_a_bound(
    optima: list[tuple[float, Bound]], expected: str | None
) -> None:
    found = [LearningRateSweep({}, (), Optimum(lr, lr, lr, bound)) for lr, bound in optima]
    times = optimum_shift(found)
    assert (times and times.text) == expected


def test_a_learning_rate_at_which_a_seed_diverges_is_not_the_best(tmp_path: Path) -> None:
    runs = [(lr, seed, loss) for seed in (0, 1) for lr, loss in bowl(1e-2)]
    records = [
        write(tmp_path, run_of("btt", 16, seed, lr=lr), 100, None if (lr, seed) == (1e-2, 1) else loss)
        for lr, seed, loss in runs
    ]
    (found,) = compare_runs(records)
    (sweep,) = sweeps_of(found, found.curves[0], TRAIN_LOSS)
    assert sweep.optimum is not None
    assert (sweep.optimum.lr, sweep.optimum.bound) == (6e-3, "")


def test_two_learning_rates_are_no_sweep(tmp_path: Path) -> None:
    records = [write(tmp_path, run_of("btt", 16, lr=lr), 100, 0.5) for lr in (1e-3, 1e-2)]
    (found,) = compare_runs(records)
    assert sweeps_of(found, found.curves[0], TRAIN_LOSS) == []


def test_the_size_that_varies_may_be_the_depth(tmp_path: Path) -> None:
    records = [write(tmp_path, run_of("btt", 16, lr=lr, depth=depth), 100, 0.5) for lr in RATES for depth in (1, 4)]
    (found,) = compare_runs(records)
    sweeps = sweeps_of(found, found.curves[0], TRAIN_LOSS)
    assert [sweep.name for sweep in sweeps] == ["width 16, depth 1", "width 16, depth 4"]
    assert varied_size(sweeps) == "depth"
    assert [len(line) for line in along("depth", sweeps)] == [2]


def test_runs_of_several_lengths_and_batch_sizes_share_a_curve(tmp_path: Path) -> None:
    sizes = {"steps": (100, 200, 200), "warmup": (10, 20, 20), "batch_size": (8, 8, 32)}
    records = [
        write(tmp_path, run_of("btt", 16, lr=lr, **dict(zip(sizes, of_run, strict=True))), 100, 0.5)
        for lr in RATES
        for of_run in zip(*sizes.values(), strict=True)
    ]
    (found,) = compare_runs(records)
    (curve,) = swept_curves(found)
    sweeps = sweeps_of(found, curve, TRAIN_LOSS)
    assert {sweep.name for sweep in sweeps} == {
        "width 16, steps 100, warmup 10, batch size 8",
        "width 16, steps 200, warmup 20, batch size 8",
        "width 16, steps 200, warmup 20, batch size 32",
    }
    assert varied_size(sweeps) == "steps"
    # warmup follows from steps, the batch size does not
    assert [[sweep.size["steps"] for sweep in line] for line in along("steps", sweeps)] == [[100, 200], [200]]
