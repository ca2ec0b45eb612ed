"""What happened in a run, a JSON object per line: `{"step": 20, "training_seconds": 1.5, "train_loss": 0.7, ...}`.

Every line has the steps made and the seconds that they took: of training alone, without loading data, evaluating and
saving, and without what an interrupted run did in vain. So the time to a loss can be read off.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Metrics:
    """The lines of a run. Steps that are made again after an interruption are written again, not twice.

    Args:
        path: of the file, or None to keep nothing.
        start: the step that the run goes on from.
    """

    def __init__(self, path: Path | None, start: int) -> None:
        self._path = path
        if path is not None:
            kept = [line for line in read(path) if line["step"] <= start]
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            scratch.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(scratch, path)

    def write(self, **values: Any) -> None:
        """Add a line. NaN and infinite numbers become null, which every reader of JSON knows."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(values))


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


def _line(values: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
