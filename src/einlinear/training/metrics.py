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

from einlinear.files import write_text
from einlinear.training.trackers import Tracker


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
    """The lines of a file, without one that was cut off at the end; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


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
