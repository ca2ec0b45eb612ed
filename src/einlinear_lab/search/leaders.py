"""The best structures that a search has found, read from its runs, and what confirms them: others beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from einlinear.files import differences
from einlinear_lab.runs.records import Record
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import open_store
from einlinear_lab.search.matching import Matching
from einlinear_lab.search.settings import Settings
from einlinear_lab.search.space import STRUCTURE, Proposal

FROM_STUDY = "from-study:"


def leaders(folder: str | Path, count: int) -> list[Record]:
    """The best finished runs by the objective of the search, the best first, one for each structure.

    Args:
        folder: of results.
        count: how many, at most.

    Raises:
        ValueError: the folder holds no results, or none that is finished.
    """
    store = open_store(folder)
    settings = Settings.read(store.folder)
    scored = [(settings.value(record.result), record) for record in store.records() if record.result]
    scored = [(value, record) for value, record in scored if value < math.inf]
    if not scored:
        raise ValueError(f"{folder} holds no finished runs yet")
    best: dict[tuple[str, ...], Record] = {}
    structures = [option for option in settings.axes if option != "width"]
    for _, record in sorted(scored, key=lambda pair: pair[0]):
        best.setdefault(tuple(record.run.options[option] for option in structures), record)
    return list(best.values())[:count]


@dataclass(frozen=True)
class Leader:
    """One of the best of a search.

    Attributes:
        record: its run.
        settings: of the search.
    """

    record: Record
    settings: Settings

    @property
    def chosen(self) -> dict[str, Any]:
        return {option: self.record.run.options[option] for option in self.settings.axes}

    @property
    def common(self) -> dict[str, Any]:
        """The options of all runs of the search."""
        options = self.record.run.options
        return {name: options[name] for name in options if name not in (*self.settings.axes, "seed")}

    @property
    def alike(self) -> dict[str, Any]:
        """What searches have to have in common to be compared."""
        common = {name: value for name, value in self.common.items() if name in self.record.run.identity}
        return {"budget": self.settings.budget, "axes": self.settings.axes, **common}


def without_leaders(specs: Sequence[str], count: int = 3) -> tuple[tuple[str, ...], list[Leader]]:
    """Specs without those that read "from-study:FOLDER", and instead of these the best of the search.

    Raises:
        ValueError: as `leaders`; two searches whose runs are not alike.
    """
    found: list[Leader] = []
    for spec in specs:
        if spec.startswith(FROM_STUDY):
            folder = Path(spec.removeprefix(FROM_STUDY))
            if not folder.exists() and (Path("results") / folder).exists():
                folder = Path("results") / folder
            found += [Leader(record, Settings.read(folder)) for record in leaders(folder, count)]
    for own in found[1:]:
        if changed := differences(found[0].alike, own.alike):
            raise ValueError(f"searches of different settings cannot be compared: {'; '.join(changed)}")
    return tuple(spec for spec in specs if not spec.startswith(FROM_STUDY)), found


def unseen_seed(best: Sequence[Leader]) -> int:
    """The first seed after those of the searches: a run that was chosen for its loss confirms nothing."""
    return max(own.record.run.seed for own in best) + 1


def as_searched(best: Sequence[Leader], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the search's runs, as far as others are not given."""
    options = best[0].common
    if given.get("epochs") is not None:
        del options["steps"]
    return options | {name: value for name, value in given.items() if value is not None}


def alongside(best: Sequence[Leader], specs: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Models, by their options: those of other structures at the compute of a search, then the best of the search.

    Args:
        best: of the search.
        specs: of the others.
        options: of all runs.

    Raises:
        DoesNotFit: one has no model of that compute.
    """
    base = Run.of({"steps": 1, **options})
    macs = [own.record.result.macs for own in best if own.record.result]
    matching = Matching(base.model, base.data.load(base.seed).shape, round(fmean(macs)), granule=1)
    matched = [matching.match({STRUCTURE: Proposal(spec)}) for spec in specs]
    return [{**own.specs, "width": own.width} for own in matched] + [own.chosen for own in best]
