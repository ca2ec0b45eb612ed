"""What a coordinate check found, as a file of a results folder.

FOLDER/coord-check.json   {"format": 1, "command": ..., "source": ..., "updates": [
                              {"structure": ..., "structure_aware": ..., "by_width": {"64": 0.1, "256": null}}, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from einlinear.files import read_json, write_json

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
        """It is near 1 where learning rates carry over; None where a run diverged or its features did not move."""
        values = self.by_width.values()
        return max(values) / min(values) if all(map(is_change, values)) else None


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


def is_change(value: float) -> bool:
    """Whether a value is a change: where a run diverged it is NaN or infinite, where nothing moved it is zero."""
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
    """Read the file of a folder; None where there is none.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {_FORMAT}")
        updates = tuple(
            Updates(
                str(found["structure"]),
                bool(found["structure_aware"]),
                {int(width): math.nan if v is None else float(v) for width, v in found["by_width"].items()},
            )
            for found in content["updates"]
        )
        return CoordinateCheck(updates, str(content["command"]), str(content["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the coordinate check in {path} cannot be read: {error}") from None
