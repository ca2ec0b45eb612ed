"""Metrics of a run: metrics.jsonl, and the trackers TensorBoard, Weights & Biases and MLflow.

A line is one JSON object: `{"step": 20, "training_seconds": 1.5, "train_loss": 0.7, ...}`. Training seconds exclude the
loading of data, evaluation, checkpoints, and steps that an interruption lost. Trackers read server and project from the
environment: WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from einlinear.files import open_regular, parse_json, write_text

# Larger numbers could overflow when they are added up.
_LARGEST = 1e300
Tracker: TypeAlias = Callable[[int, Mapping[str, float]], None]
# Names of the packages.
TRACKERS = ("tensorboard", "wandb", "mlflow")


class Metrics:
    """Writer of metrics.jsonl, or of nothing without a path; a tracker also receives the finite metrics.

    Lines after `start`, the step from which the run resumes, are dropped, as the steps are made again.
    """

    def __init__(self, path: Path | None, start: int, tracker: Tracker | None = None) -> None:
        self._path, self._tracker = path, tracker
        if path is not None:
            lines = [line for line in read(path) if line["step"] <= start]
            with _named_errors(path):
                write_text(path, "".join(map(_line, lines)))

    def write(self, step: int, **values: float) -> None:
        """Append a line. NaN and infinite numbers become null, as JSON has neither."""
        if self._path is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _named_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **finite}))
        if self._tracker is not None:
            self._tracker(step, {name: value for name, value in finite.items() if value is not None})


def read(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a file; none if the file does not exist."""
    return [line for _, line in _lines(path) if isinstance(line, dict)]


def damaged(path: Path) -> list[str]:
    """Return file, line number and error of every damaged line, such as a truncated one."""
    return [f"{path}, line {number}: {error}" for number, error in _lines(path) if isinstance(error, ValueError)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    if not path.exists():
        return
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        yield 1, ValueError(str(error))
        return
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield number, _checked(parse_json(line))
        except ValueError as error:
            yield number, error


def _checked(line: Any) -> dict[str, Any]:
    """Return the line if it is an object of numbers with a step and training seconds, else raise ValueError."""
    if not isinstance(line, dict):
        raise ValueError(f"it is {json.dumps(line)[:40]}, not an object")
    for name, value in line.items():
        if not (value is None or (type(value) in (int, float) and abs(value) < _LARGEST)):
            raise ValueError(f"{name} is {json.dumps(value)[:40]}, not a number")
    if type(line.get("step")) is not int or line.get("training_seconds") is None:
        raise ValueError("it has no step, or no training_seconds")
    return line


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file in errors: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"the metrics of the run cannot be written: {error.strerror}", str(path)) from None


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def check_installed(tracker: str) -> None:
    if find_spec(tracker) is None:
        raise ModuleNotFoundError(f"tracker={tracker!r} needs a package that is not installed: pip install {tracker}")


@contextmanager
def open_tracker(name: str, folder: Path, start: int, metadata: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open the tracker of a run that resumes from step `start`, under the id in the run's folder."""
    id_file = folder / f"{name}-id"
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / name), purge_step=start + 1) as writer:
            if start == 0:
                writer.add_text("metadata", json.dumps(metadata, indent=4), 0)

            def write(step: int, values: Mapping[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            yield write
    elif name == "wandb":
        import wandb

        with wandb.init(name=folder.name, dir=folder, config=dict(metadata), id=run_id, resume="allow") as run:
            id_file.write_text(run.id, encoding="utf-8")
            yield lambda step, values: run.log(dict(values), step=step)
    else:
        import mlflow

        with mlflow.start_run(run_id=run_id, run_name=folder.name) as run:
            id_file.write_text(run.info.run_id, encoding="utf-8")
            mlflow.log_params(dict(metadata))
            yield lambda step, values: mlflow.log_metrics(dict(values), step=step)
