"""Seconds to a loss: the fastest model of a structure, means over seeds, and what never gets there."""

from pathlib import Path
from typing import Any

import pytest
from tests.lab import made_up

from einlinear_lab.report import write_report
from einlinear_lab.report.comparison import Comparison, compare_runs
from einlinear_lab.report.training_curves import fastest, target_losses


def lines(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "training_seconds": seconds, "validation_loss": loss}
        for i, (seconds, loss) in enumerate(points)
    ]


def run(folder: Path, structure: str, width: int, seed: int, *points: tuple[float, float], **options: Any) -> None:
    made = made_up.run_of(structure, width, seed, model="gpt", data_kind="text", data="x", d_head=16)
    made_up.write(folder, made, 100 * width, points[-1][1], points[-1][1], lines=lines(*points), **options)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0), (2.0, 2.0), (3.0, 1.8))
    run(tmp_path, "dense", 32, 1, (2.0, 3.0), (4.0, 2.0), (6.0, 1.8))
    run(tmp_path, "dense", 64, 0, (10.0, 2.5), (20.0, 1.0))
    run(tmp_path, "dense", 64, 1, (10.0, 2.5), (20.0, 1.0))
    run(tmp_path, "btt", 64, 0, (4.0, 2.0), (8.0, 1.2))
    run(tmp_path, "btt", 64, 1, (4.0, 2.0), (8.0, 1.6))
    (found,) = compare_runs(made_up.Store(tmp_path).records())
    return found


def test_the_fastest_model_of_each_structure(comparison: Comparison) -> None:
    dense, btt = comparison.curves
    first, last, never = (fastest(dense, "validation_loss", loss) for loss in (2.5, 1.75, 0.9))
    assert first is not None
    assert (first.group.run.model.width, first.seconds) == (32, pytest.approx((1.5 + 3.0) / 2))
    assert last is not None
    assert (last.group.run.model.width, last.seconds) == (64, pytest.approx(15.0))
    assert never is None
    of_btt = fastest(btt, "validation_loss", 1.8)
    assert of_btt is not None
    assert of_btt.seconds == pytest.approx(((4 + 4 * 0.2 / 0.8) + (4 + 4 * 0.2 / 0.4)) / 2)
    assert of_btt.inputs_per_second == pytest.approx(comparison.records[0].result.inputs / 0.00456)  # type: ignore[union-attr]
    assert fastest(btt, "validation_loss", 1.4) is None  # one of its seeds never gets there


def test_losses_that_two_structures_reach(comparison: Comparison) -> None:
    losses = target_losses(comparison)
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] == pytest.approx(1.2, rel=2e-3)
    assert losses == sorted(losses, reverse=True)


def test_the_page_says_how_many_times_as_long_dense_needs(comparison: Comparison, tmp_path: Path) -> None:
    page = write_report([tmp_path]).path.read_text()
    assert "Training time to a target loss" in page
    assert "4 s (width 64, 0.75×)" in page  # to a loss of 2, which dense of width 32 has after 3 seconds


def test_there_is_none_without_evaluations(tmp_path: Path) -> None:
    run(tmp_path, "dense", 32, 0, (1.0, 3.0))
    run(tmp_path, "btt", 32, 0, (1.0, 3.0))
    (found,) = compare_runs(made_up.Store(tmp_path).records())
    assert target_losses(found) == []
    assert "Training time to a target loss" not in write_report([tmp_path]).path.read_text()
