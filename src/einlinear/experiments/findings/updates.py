"""What a coordinate check found, as a file of a results folder.

FOLDER/coord-check.json   {"format": 1, "command": ..., "source": ..., "updates": [
                              {"structure": ..., "structure_aware": ..., "by_width": {"64": 0.1, "256": null}}, ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from einlinear.files import write_json

FILE = "coord-check.json"
_FORMAT = 1


@dataclass(frozen=True)
class Updates:
    """How much one step changes the features after the last block, by width.

    Attributes:
        structure: its spec.
        structure_aware: whether every factor had its own learning rate, or (the control) that of a dense layer.
        by_width: width -> root mean square of the change over that of the features, means over the steps; NaN or
            infinite where the run diverged.
    """

    structure: str
    structure_aware: bool
    by_width: dict[int, float]

    @property
    def largest_over_smallest(self) -> float | None:
        """Near 1 where learning rates carry over; None where a run diverged or its features did not move at all."""
        values = self.by_width.values()
        return max(values) / min(values) if all(map(measured, values)) else None


@dataclass(frozen=True)
class CoordinateCheck:
    """What was found, and by which command.

    Attributes:
        updates: of every structure.
        command: that measured them.
        source: what it was measured on, in a sentence.
    """

    updates: tuple[Updates, ...]
    command: str
    source: str


def measured(value: float) -> bool:
    """Whether it is a change: not NaN or infinite, as where a run diverged, and not zero."""
    return 0 < value < math.inf


def write_updates(folder: Path, updates: Sequence[Updates], command: str, source: str) -> Path:
    """Write the file; what is not finite is written as null."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "structure": update.structure,
            "structure_aware": update.structure_aware,
            "by_width": {str(width): v if math.isfinite(v) else None for width, v in update.by_width.items()},
        }
        for update in updates
    ]
    path = folder / FILE
    write_json(path, {"format": _FORMAT, "command": command, "source": source, "updates": content})
    return path


def read_updates(folder: Path) -> CoordinateCheck | None:
    """The file of a folder; None where there is none.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {_FORMAT}")
        updates = tuple(
            Updates(
                found["structure"],
                found["structure_aware"],
                {int(width): math.nan if v is None else float(v) for width, v in found["by_width"].items()},
            )
            for found in content["updates"]
        )
        return CoordinateCheck(updates, content["command"], content["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the coordinate check in {path} cannot be read: {error}") from None
