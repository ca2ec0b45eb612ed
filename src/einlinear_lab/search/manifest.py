"""The manifest of a search: search.json in its results folder, read by whoever resumes the search or uses its runs."""

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
class SearchManifest:
    """Manifest of a search: its metric, its config and the place of its study.

    Attributes:
        metric: of the final model, by name; None: the error that the data is judged by.
        time_weight: the power of the seconds of a training step that the metric is multiplied by: 0 for the metric
            alone; with 0.1, twice the time is worth 7 % of the metric.
        budget: multiply-accumulates for one input; None for a folder that no search has made.
        axes: the options of the model that are chosen.
        storage: kind of storage of the study: "sqlite", "journal" or "database".
        study: name of the study; None: the name of the folder when it is made.
        id: of the results folder, to which the study belongs.
    """

    metric: str | None = None
    time_weight: float = 0.0
    budget: int | None = None
    axes: tuple[str, ...] = ("structure", "width")
    storage: str = "sqlite"
    study: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def objective(self, result: Result) -> float:
        """Return the value that is minimised, infinite if the run diverged."""
        value = result.error if self.metric is None else result.metrics.get(self.metric)
        if result.diverged or value is None:
            return math.inf
        return value * self.time_factor(result.step_seconds)

    def time_factor(self, step_seconds: float | None) -> float:
        """Return the factor on the metric for a duration of a training step."""
        return (step_seconds or 1.0) ** self.time_weight if self.time_weight else 1.0

    def write(self, folder: Path) -> SearchManifest:
        """Write the manifest into a results folder, or return the equal one that the folder has.

        Raises:
            ValueError: the folder has a different manifest.
        """
        with FileLock(folder / LOCK):
            if not (folder / _FILE).exists():
                write_json(folder / _FILE, asdict(replace(self, study=self.study or folder.resolve().name)))
            written = SearchManifest.read(folder)
        wanted = replace(self, study=self.study or written.study, id=written.id)
        if changed := differences(asdict(written), asdict(wanted)):
            raise ValueError(f"{folder} holds another search: {'; '.join(changed)}. Name another folder (--out)")
        return written

    @classmethod
    def read(cls, folder: Path) -> SearchManifest:
        """Read the manifest of a results folder; the defaults for a folder that no search has made.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / _FILE
        if not path.exists():
            return cls()
        try:
            content = read_json(path)
            content["axes"] = tuple(content["axes"])
            return parse_strictly(cls, content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the search in {path} cannot be read: {error}") from None
