"""What happened in a run, a JSON object per line: `{"step": 20, "training_seconds": 1.5, "train_loss": 0.7, ...}`.

Every line has the steps made and the seconds that they took: of training alone, without loading data, evaluating and
saving, and without what an interrupted run did in vain. So the time to a loss can be read off.
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

_LARGEST = 1e300  # of numbers that can still be added up


class Metrics:
    """The lines of a run. Steps that are made again after an interruption are written again, not twice.

    Args:
        path: of the file, or None to keep nothing.
        start: the step that the run goes on from.
        tracker: gets what is written as well, but for NaN and infinite numbers.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path | None, start: int, tracker: Tracker | None = None) -> None:
        self._path, self._tracker = path, tracker
        if path is not None:
            kept = [line for line in read(path) if line["step"] <= start]
            with _naming(path):
                write_text(path, "".join(map(_line, kept)))

    def write(self, step: int, **values: float) -> None:
        """Add a line. NaN and infinite numbers become null, which every reader of JSON knows."""
        if self._path is None:
            return
        with _naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))
        if self._tracker is not None:
            self._tracker(step, {name: value for name, value in values.items() if math.isfinite(value)})


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without those that are damaged; none where there is no file."""
    return [line for _, line in _lines(path) if isinstance(line, dict)]


def damaged(path: Path) -> list[str]:
    """What is wrong with the others, such as one that was cut off: file, line and reason."""
    return [f"{path}, line {number}: {error}" for number, error in _lines(path) if isinstance(error, ValueError)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Every line by its number, or what is wrong with it."""
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
    """A line, if it is an object of numbers with a step and its seconds."""
    if not isinstance(line, dict):
        raise ValueError(f"it is {json.dumps(line)[:40]}, not an object")
    for name, value in line.items():
        if not (value is None or (type(value) in (int, float) and abs(value) < _LARGEST)):
            raise ValueError(f"{name} is {json.dumps(value)[:40]}, not a number")
    if type(line.get("step")) is not int or line.get("training_seconds") is None:
        raise ValueError("it has no step, or no training_seconds")
    return line


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of writing it: where its disk is full, the error does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"the metrics of the run cannot be written: {error.strerror}", str(path)) from None


def _line(values: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
