"""The scaling laws of runs: those that made-up losses were drawn from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.made_up import run_of, write

from einlinear_lab.analysis.comparison import TRAIN_LOSS, compare_runs
from einlinear_lab.analysis.curve_fits import CurveFit, evaluations, laws_as_json, laws_of_training, laws_per_input
from einlinear_lab.runs.records import Record

BATCH = 256  # the default of images
WIDTHS = (16, 32, 64, 128)


def law(macs: float, times: float = 1.0) -> float:
    return 3 * (times * macs) ** -0.12


def final(folder: Path, structure: str, times: float, **options: Any) -> list[Record]:
    """Models that are as good as dense ones of so many times their MACs."""
    return [
        write(folder, run_of(structure, width, **options), 10 * width**2, law(10 * width**2, times)) for width in WIDTHS
    ]


def test_a_law_over_the_macs_of_an_input(tmp_path: Path) -> None:
    (comparison,) = compare_runs([*final(tmp_path, "dense", 1), *final(tmp_path, "btt", 2)])
    laws = laws_per_input(comparison, TRAIN_LOSS)
    assert laws.compute == "MACs per image"
    for own, times in zip(laws.curves, (1, 2), strict=True):
        assert own.fit is not None
        assert own.fit.law.exponent == pytest.approx(0.12)
        assert own.fit.law(1e6) == pytest.approx(law(1e6, times))
    dense, btt = laws.curves
    assert dense.multipliers == ()
    assert [at.multiplier.value for at in btt.multipliers if not at.multiplier.bound] == pytest.approx(
        [2] * sum(not at.multiplier.bound for at in btt.multipliers)
    )
    assert btt.interval is not None
    assert btt.interval.source == "regression"  # there is one seed only
    halves = laws_per_input(comparison, "train_error").curves[0].fit
    assert halves is not None
    assert halves.law(1e6) == pytest.approx(law(1e6) / 2)


def test_models_above_the_hull_belong_to_the_law_but_not_those_that_cheaper_ones_beat(tmp_path: Path) -> None:
    losses = {16: 1.0, 32: 0.95, 64: 0.5, 128: 0.6, 256: 0.25}
    records = [write(tmp_path, run_of("dense", width), 10 * width**2, loss) for width, loss in losses.items()]
    (own,) = laws_per_input(compare_runs(records)[0], TRAIN_LOSS).curves
    assert own.fit is not None
    assert own.fit.frontier.loss.tolist() == [1.0, 0.95, 0.5, 0.25]


def lines(macs: int, steps: int) -> list[dict[str, Any]]:
    """Five evaluations, of which the third is above the law."""
    return [
        {"step": step, "training_seconds": step / 9, "train_error": law(macs * BATCH * step) * (1.3 if k == 2 else 1)}
        for k, step in enumerate(range(steps // 5, steps + 1, steps // 5))
    ]


def trained(folder: Path, steps: int) -> list[Record]:
    return [
        write(
            folder,
            run_of("dense", width, steps=steps),
            10 * width**2,
            1.0,
            error=lines(10 * width**2, steps)[-1]["train_error"],
            lines=lines(10 * width**2, steps),
        )
        for width in WIDTHS
    ]


def test_a_law_over_the_compute_of_the_training(tmp_path: Path) -> None:
    """Runs of both lengths are on one curve here, and on two in what compares final losses."""
    (comparison,) = compare_runs([*trained(tmp_path, 100), *trained(tmp_path, 200)])
    assert [curve.name for curve in comparison.curves] == ["dense, steps=100", "dense, steps=200"]
    laws = laws_of_training(comparison)
    assert laws is not None
    (own,) = laws.curves
    assert own.curve.name == "dense"
    assert len(own.groups) == 8
    assert [len(losses.compute) for losses in own.losses] == [5] * 8
    assert own.fit is not None
    assert own.fit.law.exponent == pytest.approx(0.12)
    assert own.fit.law.r_squared == pytest.approx(1)
    assert max(own.fit.frontier.compute) == 10 * 128**2 * BATCH * 200


def test_the_frontier_of_training_has_rules(tmp_path: Path) -> None:
    (comparison,) = compare_runs(trained(tmp_path, 200))

    def points(**rules: Any) -> list[float]:
        laws = laws_of_training(comparison, **rules)
        assert laws is not None
        assert laws.curves[0].fit is not None
        return laws.curves[0].fit.frontier.compute.tolist()

    everything = points()
    low, high = everything[1], everything[-2]
    assert points(window=(low, high)) == everything[1:-1]
    with pytest.raises(ValueError, match="tolerance is a share of the loss"):
        points(tolerance=-0.5)
    with pytest.raises(ValueError, match="window is from the least to the most compute, not from 2 to 1"):
        points(window=(2.0, 1.0))


def test_without_evaluations_during_training_there_is_no_such_law(tmp_path: Path) -> None:
    (comparison,) = compare_runs(final(tmp_path, "dense", 1))
    assert laws_of_training(comparison) is None


def test_an_assumed_floor_and_errors_at_it(tmp_path: Path) -> None:
    losses = [*(0.5 + law(10 * width**2) for width in WIDTHS), 0.5]
    records = [
        write(tmp_path, run_of("dense", width), 10 * width**2, loss)
        for width, loss in zip((*WIDTHS, 256), losses, strict=True)
    ]
    (own,) = laws_per_input(compare_runs(records)[0], TRAIN_LOSS, floor=0.5).curves
    assert own.fit is not None
    assert own.fit.law.exponent == pytest.approx(0.12)
    assert [group.run.model.width for group in own.groups] == list(WIDTHS)


def test_json_has_all_numbers_and_says_why_there_is_no_law(tmp_path: Path) -> None:
    records = [*final(tmp_path, "dense", 1), *final(tmp_path, "btt", 2), write(tmp_path, run_of("tt"), 99, 0.5)]
    laws = laws_per_input(compare_runs(records)[0], TRAIN_LOSS)
    content = json.loads(json.dumps(laws_as_json(laws, [1e9]), allow_nan=False))
    dense, btt, tt = content["structures"]
    assert dense["exponent"] == pytest.approx(0.12)
    assert btt["predictions"][0]["loss"] == pytest.approx(law(1e9, 2))
    assert btt["compute_multipliers"][0]["multiplier"] == pytest.approx(2)
    assert "at least 3 points" in tt["no_law_reason"]
    assert isinstance(laws.curves[2], CurveFit)


def test_a_model_that_is_made_dense_costs_less_before(tmp_path: Path) -> None:
    run = run_of("btt", 16, densify_at=60)
    (group,) = compare_runs([write(tmp_path, run, 1000, 0.5, lines=lines(1000, 100))])[0].groups
    cheap = 100
    compute = BATCH * (60 * cheap + 40 * 1000)
    group = replace(group, records=(replace(group.records[0], result=replace(group.result, compute=compute)),))
    measured = evaluations(group, "train_error")
    assert measured.compute[-1] == compute
    steps = [line["step"] for line in lines(1000, 100)]
    expected = [BATCH * (min(step, 60) * cheap + max(step - 60, 0) * 1000) for step in steps]
    assert measured.compute.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("densify_at", "cheap"), [(None, 1000), (60, 100)])
def test_a_model_with_guides_costs_more_before(tmp_path: Path, densify_at: int | None, cheap: int) -> None:
    run, guides = run_of("btt", 16, guide_until=30, densify_at=densify_at), 500
    (group,) = compare_runs([write(tmp_path, run, 1000, 0.5, lines=lines(1000, 100))])[0].groups
    steps = [line["step"] for line in lines(1000, 100)]
    expected = [BATCH * (min(t, 30) * guides + min(t, 60) * cheap + max(t - 60, 0) * 1000) for t in steps]
    own = replace(group.result, compute=expected[-1], guide_macs=guides)
    group = replace(group, records=(replace(group.records[0], result=own),))
    assert evaluations(group, "train_error").compute.tolist() == pytest.approx(expected)
