"""What a search minimises. It is noted in the results folder, so that whoever reads the runs knows which are best."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from einlinear.experiments.runs.records import Result
from einlinear.files import write_json

_FILE = "objective.json"


@dataclass(frozen=True)
class Objective:
    """A measure of the final model, times a power of the seconds that a training step takes.

    Attributes:
        measure: by name; None: the error that the data is judged by.
        time_weight: the power: 0 for the measure alone; with 0.1, twice the time is worth 7 % of the measure.
    """

    measure: str | None = None
    time_weight: float = 0.0

    def of(self, result: Result) -> float:
        """What a run is judged by, infinite if it diverged."""
        value = result.error if self.measure is None else result.measures.get(self.measure)
        if result.diverged or value is None:
            return math.inf
        return value * (result.step_seconds or 1.0) ** self.time_weight if self.time_weight else value

    def write(self, folder: Path) -> None:
        write_json(folder / _FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Objective:
        """That of a results folder; of one that no search has made, the default."""
        path = folder / _FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()
