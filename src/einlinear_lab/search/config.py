"""The config of a search, and its manifest: search.json in the results folder."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from einlinear.files import differences, read_json, write_json
from einlinear_lab.runs.options import parse_strictly
from einlinear_lab.runs.records import Record
from einlinear_lab.search.space import STRUCTURE, SearchSpace, option_of

# Trained trials before a sampler leaves the random ones, and before any trial is pruned.
STARTUP_TRIALS = 8
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True),
    "random": lambda seed: RandomSampler(seed),
}
LOCK = ".search.lock"
_FILE = "search.json"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Config of a search.

    Attributes:
        budget: multiply-accumulates for one input, of every model.
        trials: number of models to be trained.
        hours: no trial starts later than this.
        families, roles: of structures and of linear layers, see `SearchSpace`.
        sampler: Optuna's sampler: "gp" (Gaussian process), "tpe" (tree-structured Parzen estimator), "random".
        warm_start: try the structures of `SearchSpace.literature` first; never with "random".
        prune: stop trials early that are behind half of the others, by successive halving.
        metric: to be minimised; None: the metric by which runs on the data are compared.
        time_weight: how much the time of a training step counts, see `SearchManifest`.
        seed: of the sampler.
        options: of all runs, see `Run.of`, without structure and width.

    Raises:
        ValueError: a value out of range, or an option that the search chooses.
    """

    budget: int
    trials: int = 60
    hours: float | None = None
    families: tuple[str, ...] = ("einsum",)
    roles: tuple[str, ...] = ()
    sampler: str = "gp"
    warm_start: bool = True
    prune: bool = True
    metric: str | None = None
    time_weight: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be {', '.join(SAMPLERS)}, not {self.sampler!r}")
        for name in ("budget", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours must be positive, not {self.hours:g}")
        if self.time_weight < 0:
            raise ValueError(f"time_weight must be at least 0, not {self.time_weight:g}")
        SearchSpace(self.families, self.roles)
        if chosen := sorted(self.axes & self.options.keys()):
            raise ValueError(f"{' and '.join(chosen)} cannot be set: the search chooses them")

    @property
    def axes(self) -> frozenset[str]:
        """The options of the model that the search chooses."""
        return frozenset({STRUCTURE, "width", *map(option_of, self.roles)})


@dataclass(frozen=True)
class SearchManifest:
    """What others need of a search: its objective, what it chooses, and the place of its study.

    Attributes:
        metric: of the final model, by name; None: the metric by which runs on the data are compared.
        time_weight: the power of the seconds of a training step that the metric is multiplied by: 0 for the metric
            alone; with 0.1, twice the time is worth 7 % of the metric.
        budget: multiply-accumulates for one input; None for a folder that no search has made.
        axes: the options of the model that are chosen.
        storage, study: kind of storage ("sqlite", "journal", "database") and name of the study (None: of the folder).
        id: of the results folder, to which the study belongs.
    """

    metric: str | None = None
    time_weight: float = 0.0
    budget: int | None = None
    axes: tuple[str, ...] = ("structure", "width")
    storage: str = "sqlite"
    study: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def objective(self, record: Record) -> float:
        """Return the value of a finished run that is minimised, infinite if the run diverged."""
        result = record.result
        value = result.metrics.get(self.metric or record.metric) if result else None
        if result is None or value is None:
            return math.inf
        return value * self.time_factor(result.step_seconds)

    def time_factor(self, step_seconds: float | None) -> float:
        """Return the factor on the metric for a duration of a training step."""
        return (step_seconds or 1.0) ** self.time_weight if self.time_weight else 1.0

    def write(self, folder: Path) -> SearchManifest:
        """Write the manifest, or return the equal one that the folder has; raise ValueError for another one."""
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
        """Read the manifest of a results folder; the defaults for a folder that no search has made."""
        path = folder / _FILE
        if not path.exists():
            return cls()
        try:
            content = read_json(path)
            return parse_strictly(cls, {**content, "axes": tuple(content["axes"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the search in {path} cannot be read: {error}") from None
