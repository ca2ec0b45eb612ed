"""The best structures of a search, and other structures at the same compute to confirm them against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from einlinear.files import differences
from einlinear_lab.runs.records import Record
from einlinear_lab.runs.run import model_and_data
from einlinear_lab.runs.store import open_store
from einlinear_lab.search.config import SearchManifest
from einlinear_lab.search.matching import Matching
from einlinear_lab.search.space import STRUCTURE, Proposal

FROM_STUDY = "from-study:"


@dataclass(frozen=True)
class Leader:
    """One of the best structures of a search: its run, and the manifest of the search."""

    record: Record
    manifest: SearchManifest

    @property
    def model(self) -> dict[str, Any]:
        """The options of the model that the search chose."""
        return {option: self.record.run.config[option] for option in self.manifest.axes}

    @property
    def shared(self) -> dict[str, Any]:
        """The options that all runs of the search share."""
        options = self.record.run.config
        return {name: value for name, value in options.items() if name not in (*self.manifest.axes, "seed")}

    @property
    def comparable(self) -> dict[str, Any]:
        """All that has to be equal for two searches to be compared."""
        shared = {name: value for name, value in self.shared.items() if name in self.record.run.hyperparameters}
        return {"budget": self.manifest.budget, "axes": self.manifest.axes, **shared}


def read_leaders(folder: str | Path, count: int) -> list[Leader]:
    """Return the best finished run of each structure, at most `count`, by the objective of the search, best first."""
    store = open_store(folder)
    manifest = SearchManifest.read(store.folder)
    scored = [(manifest.objective(record), record) for record in store.records() if record.result]
    best: dict[tuple[str, ...], Leader] = {}
    structures = [option for option in manifest.axes if option != "width"]
    for value, record in sorted(scored, key=lambda pair: pair[0]):
        if value < math.inf:
            best.setdefault(tuple(record.run.config[option] for option in structures), Leader(record, manifest))
    if not best:
        raise ValueError(f"{folder} holds no finished runs yet")
    return list(best.values())[:count]


def split_leaders(specs: Sequence[str], count: int = 3) -> tuple[tuple[str, ...], list[Leader]]:
    """Return the specs that are structures, and the leaders of the searches in those that read "from-study:FOLDER"."""
    leaders: list[Leader] = []
    for spec in specs:
        if spec.startswith(FROM_STUDY):
            folder = Path(spec.removeprefix(FROM_STUDY))
            if not folder.exists() and (Path("results") / folder).exists():
                folder = Path("results") / folder
            leaders += read_leaders(folder, count)
    for leader in leaders[1:]:
        if changed := differences(leaders[0].comparable, leader.comparable):
            raise ValueError(f"searches of different configs cannot be compared: {'; '.join(changed)}")
    return tuple(spec for spec in specs if not spec.startswith(FROM_STUDY)), leaders


def unseen_seed(leaders: Sequence[Leader]) -> int:
    """Return the first seed after those of the searches: a run that was chosen for its loss confirms nothing."""
    return max(leader.record.run.seed for leader in leaders) + 1


def as_searched(leaders: Sequence[Leader], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, completed by those of the search's runs."""
    shared = leaders[0].shared
    if options.get("epochs") is not None:
        del shared["steps"]
    return shared | {name: value for name, value in options.items() if value is not None}


def alongside(leaders: Sequence[Leader], specs: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of models: other structures at the compute of the leaders, then the leaders."""
    model, data = model_and_data(options)
    macs = [leader.record.result.macs for leader in leaders if leader.record.result]
    matching = Matching(model, data.load(seed=0).shape, round(fmean(macs)), granule=1)
    others = [matching.match({STRUCTURE: Proposal(spec)}) for spec in specs]
    return [*({**other.specs, "width": other.width} for other in others), *(leader.model for leader in leaders)]
