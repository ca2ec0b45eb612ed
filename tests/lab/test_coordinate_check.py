"""Coordinate checks of the models that runs train, and what is on disk of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from einlinear_lab.coordinate_check import FILE, FeatureUpdates, cases, measure, read_updates, template, write_updates
from einlinear_lab.runs.options import names
from einlinear_lab.training import TrainingConfig

UPDATES = [FeatureUpdates("dense", True, {16: 0.1, 64: 0.2}), FeatureUpdates("btt", False, {16: 0.1, 64: math.inf})]


def test_they_come_back_and_divergence_is_null(tmp_path: Path) -> None:
    path = write_updates(tmp_path / "new", UPDATES, "einlinear coord-check", "Digits")
    found = read_updates(tmp_path / "new")
    assert found is not None
    assert (found.command, found.source) == ("einlinear coord-check", "Digits")
    assert found.updates[0] == UPDATES[0]
    assert found.updates[0].max_over_min == pytest.approx(2)
    assert math.isnan(found.updates[1].by_width[64])
    assert found.updates[1].max_over_min is None
    assert json.loads(path.read_text())["updates"][1]["by_width"] == {"16": 0.1, "64": None}


def test_none_and_damaged(tmp_path: Path) -> None:
    assert read_updates(tmp_path) is None
    for content in ("{", "[]", '{"format": 9}', '{"format": 1, "updates": [{}]}', '{"format": 1, "updates": 3}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match=r"the coordinate check in .* cannot be read"):
            read_updates(tmp_path)


QUICK: dict[str, Any] = {"data": "digits", "steps": 4, "depth": 1, "batch_size": 64, "base_width": 16}


def relative_updates(structures: tuple[str, ...] = ("dense",), **options: Any) -> list[dict[int, float]]:
    run = template(QUICK | options)
    found = list(measure(run, run.data.load(run.seed), structures, (16, 32)))
    assert [(update.structure, update.structure_aware) for update in found] == cases(structures)
    assert all(update.by_width.keys() == {16, 32} for update in found)
    return [update.by_width for update in found]


def test_every_case_is_measured_at_every_width() -> None:
    dense, btt, naive = relative_updates(("dense", "btt"))
    assert len({*dense.values(), *btt.values(), *naive.values()}) == 6
    assert relative_updates(("dense", "btt")) == [dense, btt, naive]


def test_changes_are_means_over_initialisations() -> None:
    run = template(QUICK)
    problem = run.data.load(run.seed)
    (both,) = measure(run, problem, ("dense",), (16, 32), seeds=2)
    (first,), (second,) = (measure(replace(run, seed=seed), problem, ("dense",), (16, 32)) for seed in (0, 1))
    assert first.by_width != second.by_width
    for width, mean in both.by_width.items():
        assert mean == pytest.approx((first.by_width[width] + second.by_width[width]) / 2)


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.5},
        {"mixup": 1.0},
        {"lr": 1e-2},
        {"seed": 1},
        {"permute": False},
        {"depth": 2},
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
    ],
)
def test_what_can_be_set_changes_the_updates(change: dict[str, Any]) -> None:
    assert relative_updates(**change) != relative_updates()


def test_what_would_change_nothing_is_refused() -> None:
    others = [name for name in names(TrainingConfig) if name not in ("steps", "lr", "optimizer", "product")]
    for name in (*others, "structure", "width", "validation_tokens"):
        with pytest.raises(ValueError, match=f"{name} cannot be set: a coordinate check .* only steps, lr, optim"):
            template(QUICK | {name: 1})
