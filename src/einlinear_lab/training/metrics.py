"""Metrics of a run, one JSON object a line: `{"step": 20, "training_seconds": 1.5, "train_loss": 0.7, ...}`.

Training seconds exclude the loading of data, evaluation, checkpoints, and steps that an interruption lost, so that the
time to a loss can be read from the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from einlinear.files import open_regular, parse_json, write_text
from einlinear_lab.training.trackers import Tracker

# Larger numbers could overflow when they are added up.
_LARGEST = 1e300


class Metrics:
    """Writer of metrics.jsonl. Lines after the step of the checkpoint are dropped, as the steps are made again.

    Args:
        path: of the file, or None to write nothing.
        start: step from which the run resumes.
        tracker: also receives the metrics, except NaN and infinite numbers.

    Raises:
        OSError: the disk is full, or the file cannot be written.
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
