"""Trackers: what they are told, also when a run is interrupted."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.lab.training import toy
from torch import Tensor

from einlinear_lab.training import TrainingConfig, metrics
from einlinear_lab.training.metrics import TRACKERS


class Recorder:
    """Stands for the packages: keeps what it is told, by step, and how a run was opened."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.told: dict[int, dict[str, float]] = {}
        self.id = "run-7"
        self.info = SimpleNamespace(run_id="run-7")
        self.closed = 0

    def open(self, *args: Any, **options: Any) -> "Recorder":
        self.opened.append(options | dict(enumerate(args)))
        return self

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed += 1

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.setdefault(step, {}).update(values)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.metadata = text

    def log_params(self, metadata: dict[str, Any]) -> None:
        self.metadata = str(metadata)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    contents = {
        "tensorboard": {},
        "torch.utils.tensorboard": {"SummaryWriter": found.open},
        "wandb": {"init": found.open},
        "mlflow": {"start_run": found.open, "log_params": found.log_params, "log_metrics": found.log},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_is_told_what_the_file_is(
    tmp_path: Path, tracker: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 12, "checkpoint_every": 5, "log_every": 2, "metadata": {"data": "a toy"}}
    batch, stop = toy.Toy.batch, 9

    def interrupted(self: toy.Toy, step: int) -> tuple[Tensor, Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(toy.Toy, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "a run", tracker=tracker, **options)
    assert recorder.closed == 1
    stop = -1
    found = toy.run(tmp_path / "a run", tracker=tracker, **options)
    expected: dict[int, dict[str, float]] = {}
    for line in metrics.read(tmp_path / "a run" / "metrics.jsonl"):
        expected.setdefault(line.pop("step"), {}).update(line)
    assert recorder.told == expected
    assert recorder.told[12]["error"] == found.metrics["error"]
    assert recorder.closed == len(recorder.opened) == 2
    first, second = recorder.opened
    if tracker == "tensorboard":
        assert (first["purge_step"], second["purge_step"]) == (1, 6)
    else:
        id_name = "id" if tracker == "wandb" else "run_id"
        assert (first[id_name], second[id_name]) == (None, "run-7")
    assert "a toy" in (str(first["config"]) if tracker == "wandb" else recorder.metadata)


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path, recorder: Recorder) -> None:
    found = toy.run(tmp_path, tracker="wandb", optimizer="sgd", lr=1e6, steps=50)
    assert found.diverged
    assert "lr" in recorder.told[len(found.losses)]
    assert "train_loss" not in recorder.told[len(found.losses)]


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="tracker must be None or tensorboard or wandb or mlflow, not 'comet'"):
        TrainingConfig(steps=1, tracker="comet")
    with pytest.raises(ValueError, match="tracker='wandb' needs a folder"):
        toy.run(tracker="wandb")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match=r"tracker='wandb' needs a package .* pip install wandb"):
        toy.run(tmp_path, tracker="wandb")
