"""What a search has settled, noted in its results folder for whoever goes on with it or reads its runs."""

from __future__ import annotations

import math
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from einlinear.files import differences, read_json, write_json
from einlinear_lab.runs.options import parse_strictly
from einlinear_lab.runs.records import Result

LOCK = ".search.lock"
_FILE = "search.json"


@dataclass(frozen=True)
class Settings:
    """What candidates are judged by, and what was chosen about them.

    Attributes:
        measure: of the final model, by name; None: the error that the data is judged by.
        time_weight: the power of the seconds of a training step that the measure is multiplied by: 0 for the measure
            alone; with 0.1, twice the time is worth 7 % of the measure.
        budget: multiply-accumulates for one input; None of a folder that no search has made.
        axes: the options of the model that are chosen.
        storage: what kind the study is kept in: "sqlite", "journal" or "database".
        study: its name; None: what the folder is called when it is made.
        id: of the results folder: a study belongs to one.
    """

    measure: str | None = None
    time_weight: float = 0.0
    budget: int | None = None
    axes: tuple[str, ...] = ("structure", "width")
    storage: str = "sqlite"
    study: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def value(self, result: Result) -> float:
        """What a run is judged by, infinite if it diverged."""
        value = result.error if self.measure is None else result.measures.get(self.measure)
        if result.diverged or value is None:
            return math.inf
        return value * self.of_time(result.step_seconds)

    def of_time(self, step_seconds: float | None) -> float:
        """What the seconds of a step multiply the measure by."""
        return (step_seconds or 1.0) ** self.time_weight if self.time_weight else 1.0

    def settle(self, folder: Path) -> Settings:
        """Note them in a results folder, or take those that it has.

        Raises:
            ValueError: it has others.
        """
        with FileLock(folder / LOCK):
            if not (folder / _FILE).exists():
                write_json(folder / _FILE, asdict(replace(self, study=self.study or folder.resolve().name)))
            found = Settings.read(folder)
        if changed := differences(asdict(found), asdict(replace(self, study=self.study or found.study, id=found.id))):
            raise ValueError(f"{folder} holds another search: {'; '.join(changed)}. Name another folder (--out)")
        return found

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of a results folder; of one that no search has made, the defaults.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / _FILE
        if not path.exists():
            return cls()
        try:
            given = read_json(path)
            given["axes"] = tuple(given["axes"])
            return parse_strictly(cls, given)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the search in {path} cannot be read: {error}") from None
