"""Sweeps: which runs a file describes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.lab.pools.run_sweeps import FOUR, SETTINGS

from einlinear_lab.sweeps.sweep import make_sweep, read_sweep


def test_config_grid_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text("""
        [config]
        data = "digits"
        steps = 6
        width = 64
        [grid]
        seed = [0, 1]
        lr = [1e-3, 3e-3]
        [[parts]]
        config = { structure = "dense" }
        [[parts]]
        config = { structure = "btt", lr = 1e-2 }
        grid = { width = [32, 48, 32] }
    """)
    sweep = read_sweep(path)
    dense = {(run.model.width, run.training.lr, run.seed) for run in sweep.runs if run.model.structure == "dense"}
    assert dense == {(64, lr, seed) for lr in (1e-3, 3e-3) for seed in (0, 1)}
    btt = [(run.model.width, run.training.lr, run.seed) for run in sweep.runs if run.model.structure == "btt"]
    assert sorted(btt) == [(width, 1e-2, seed) for width in (32, 48) for seed in (0, 1)]
    assert sweep.axes == {"structure", "seed", "lr", "width"}
    overridden = read_sweep(path, {"steps": "9", "seed": "3"})
    assert {(run.training.steps, run.seed) for run in overridden.runs} == {(9, 3)}
    (tmp_path / "sweep.json").write_text(json.dumps(FOUR))
    assert len(read_sweep(tmp_path / "sweep.json").runs) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"confg": {}}, "has no option 'confg'. Did you mean 'config'"),
        ({"config": SETTINGS, "parts": [{"grids": {}}]}, "a part of a sweep has no option 'grids'"),
        ({"config": SETTINGS, "grid": {"lr": 1e-3}}, "the grid of lr must be a list of values, not 0.001"),
        ({"config": SETTINGS, "grid": {"lr": []}}, "describes no runs"),
        (
            {"config": SETTINGS, "parts": [{"config": {"lr": 0.1}, "grid": {"lr": [0.1, 0.2]}}]},
            "a part of a sweep has lr in its config and in its grid",
        ),
        ({"config": SETTINGS, "grid": {"lerning_rate": [1]}}, "no option 'lerning_rate'"),
        ({"config": SETTINGS, "grid": {"lr": [0.1, -1]}}, "lr must be a positive number, not -1"),
    ],
)
def test_a_wrong_file_says_what_is_right(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sweep(content)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[config")
    with pytest.raises(ValueError, match=r"a\.toml cannot be read"):
        read_sweep(tmp_path / "a.toml")
