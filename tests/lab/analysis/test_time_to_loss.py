"""Seconds to a loss: the frontier of a structure, means over seeds, and multipliers where both were measured."""

from pathlib import Path
from typing import Any

import pytest
from tests.lab import made_up

from einlinear_lab.analysis.comparison import Comparison, compare_runs
from einlinear_lab.analysis.time_to_loss import (
    TimeFrontier,
    frontiers_of,
    multiplier_at,
    multipliers_over,
    target_losses,
)
from einlinear_lab.report import write_report
from einlinear_lab.report.loss_over_time import section


def run(folder: Path, structure: str, width: int, seed: int, *points: tuple[float, float], **options: Any) -> None:
    """A run that is evaluated after every step: (seconds, loss). Its MACs per token are 100 times its width."""
    lines = [
        {"step": i + 1, "training_seconds": seconds, "validation_loss": loss}
        for i, (seconds, loss) in enumerate(points)
    ]
    made = made_up.run_of(structure, width, seed, model="gpt", data_kind="text", data="x", d_head=16)
    made_up.write(folder, made, 100 * width, points[-1][1], points[-1][1], lines=lines, **options)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0), (2.0, 2.0), (3.0, 1.8))
    run(tmp_path, "dense", 32, 1, (2.0, 3.0), (4.0, 2.0), (6.0, 1.8))
    run(tmp_path, "dense", 64, 0, (10.0, 2.5), (20.0, 1.0))
    run(tmp_path, "dense", 64, 1, (10.0, 2.5), (20.0, 1.0))
    run(tmp_path, "btt", 64, 0, (4.0, 2.0), (8.0, 1.2))
    run(tmp_path, "btt", 64, 1, (4.0, 2.0), (8.0, 1.6))
    return read(tmp_path)


def read(folder: Path) -> Comparison:
    (found,) = compare_runs(made_up.Store(folder).records())
    return found


def to(frontier: TimeFrontier, loss: float, **options: Any) -> tuple[int, float] | None:
    """Width and cost of the cheapest model."""
    found = frontier.to(loss, **options)
    return found and (found[1].run.model.width, pytest.approx(found[0]))  # type: ignore[return-value]


def test_the_frontier_is_the_least_time_of_all_models(comparison: Comparison) -> None:
    dense, btt = frontiers_of(comparison)
    assert to(dense, 2.5) == (32, (1.5 + 3.0) / 2)
    assert to(dense, 1.75) == (64, 15.0)
    assert to(dense, 0.9) is None
    assert to(btt, 1.8) == (64, ((4 + 4 * 0.2 / 0.8) + (4 + 4 * 0.2 / 0.4)) / 2)
    assert to(btt, 1.4) is None  # one of its seeds never gets there
    assert (dense.first, dense.lowest, btt.first, btt.lowest) == (2.5, 1.0, 2.0, 1.6)


def test_the_frontier_of_compute_may_be_of_another_model(comparison: Comparison) -> None:
    dense, _ = frontiers_of(comparison)
    per_step = 100 * comparison.records[0].result.inputs  # type: ignore[union-attr]
    assert to(dense, 2.0) == (32, 3.0)
    assert to(dense, 2.0, cost="macs") == (32, 2 * 32 * per_step)
    assert to(dense, 1.8, cost="macs") == (64, (1 + 0.7 / 1.5) * 64 * per_step)
    assert to(dense, 1.8) == (32, 4.5)


def test_multipliers_of_time_and_compute(comparison: Comparison) -> None:
    dense, btt = frontiers_of(comparison)
    at = multiplier_at(btt, dense, 1.8)
    assert at is not None
    assert at.time == pytest.approx(4.5 / 5.5)
    assert at.compute == pytest.approx((1 + 0.7 / 1.5) / ((1 + 0.25 + 1 + 0.5) / 2))
    assert multiplier_at(btt, dense, 1.4) is None
    assert multiplier_at(dense, btt, 1.4) is None


def test_no_multiplier_is_extrapolated(comparison: Comparison) -> None:
    """They go from the first evaluation, below which both are known, to the lowest loss that both reach."""
    dense, btt = frontiers_of(comparison)
    losses = [at.loss for at in multipliers_over(btt, dense)]
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] == pytest.approx(1.6, rel=2e-3)
    assert losses == sorted(losses, reverse=True)
    assert losses == [at.loss for at in multipliers_over(dense, btt)]


def test_structures_without_a_common_loss_have_no_multiplier(tmp_path: Path) -> None:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0), (2.0, 2.5))
    run(tmp_path, "btt", 32, 0, (1.0, 2.0), (2.0, 1.0))
    dense, btt = frontiers_of(read(tmp_path))
    assert multipliers_over(btt, dense) == []
    assert target_losses([dense, btt]) == []
    assert section(read(tmp_path)) is None


def test_a_seed_that_diverged_reaches_no_loss(tmp_path: Path) -> None:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0), (2.0, 2.0))
    made = made_up.run_of("dense", 32, 1, model="gpt", data_kind="text", data="x", d_head=16)
    made_up.write(tmp_path, made, 3200, None)
    run(tmp_path, "dense", 64, 0, (2.0, 3.0), (4.0, 2.2))
    (dense,) = frontiers_of(read(tmp_path))
    assert to(dense, 2.5) == (64, 3.25)
    assert dense.lowest == 2.2


def test_losses_that_two_structures_reach(comparison: Comparison) -> None:
    losses = target_losses(frontiers_of(comparison))
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] == pytest.approx(1.6, rel=2e-3)
    assert losses == sorted(losses, reverse=True)


def test_the_page_shows_curves_frontiers_and_multipliers(comparison: Comparison, tmp_path: Path) -> None:
    page = write_report([tmp_path]).path.read_text()
    assert "Loss against seconds" in page
    found = section(comparison)
    assert found is not None
    curves, multipliers = found.figures
    assert len(curves.data) == 2 * (3 + 2 + 2)
    assert {"curve": "btt", "width": 64, "seconds": 8.0, "validation_loss": 1.2}.items() <= curves.data[-3].items()
    assert {row["curve"] for row in multipliers.data} == {"btt"}
    assert multipliers.data[0] == pytest.approx(
        {"curve": "btt", "loss": 2.0, "time_multiplier": 0.75, "compute_multiplier": 1.0}
    )
    (table,) = found.tables
    texts = [[cell.text for cell in row] for row in table.rows]
    throughput = f"{comparison.records[0].result.inputs / 0.00456:,.0f}"  # type: ignore[union-attr]
    assert [row[:2] for row in texts] == [[name, row[1]] for name in ("dense", "btt") for row in texts[:5]]
    assert texts[0] == ["dense", "2", "3", "32", "–", "–", throughput]
    assert texts[5] == ["btt", "2", "4", "64", "0.75×", "1.00×", throughput]


def test_an_error_of_zero_is_left_out(tmp_path: Path) -> None:
    for structure in ("dense", "btt"):
        run(tmp_path, structure, 32, 0, (1.0, 3.0), (2.0, 1.0), (3.0, 0.0))
    assert [frontier.lowest for frontier in frontiers_of(read(tmp_path))] == [1.0, 1.0]


def test_there_is_none_without_evaluations(tmp_path: Path) -> None:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0))
    run(tmp_path, "btt", 32, 0, (1.0, 3.0))
    assert frontiers_of(read(tmp_path)) == []
    assert "Loss against seconds" not in write_report([tmp_path]).path.read_text()
