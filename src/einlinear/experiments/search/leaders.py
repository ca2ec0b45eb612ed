"""The best structures that a search has found, read from its runs, and what confirms them: others beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from einlinear.experiments.runs.records import Record
from einlinear.experiments.runs.run import Run
from einlinear.experiments.runs.store import open_store
from einlinear.experiments.search.matching import Matching
from einlinear.experiments.search.space import Proposal
from einlinear.experiments.sweeps.compare import AXES
from einlinear.files import differences

FROM_STUDY = "from-study:"


def leaders(folder: str | Path, count: int, measure: str | None = None) -> list[Record]:
    """The finished runs of the least error, the best first, one for each structure.

    Args:
        folder: of results.
        count: how many, at most.
        measure: what is compared; None: the error that the data is judged by.

    Raises:
        ValueError: the folder holds no results, or none that is finished.
    """
    scored = []
    for record in open_store(folder).records():
        if record.result is not None and not record.result.diverged:
            value = record.result.error if measure is None else record.result.measures.get(measure)
            if value is not None:
                scored.append((value, record))
    if not scored:
        raise ValueError(f"{folder} holds no finished runs yet")
    best: dict[str, Record] = {}
    for _, record in sorted(scored, key=lambda pair: pair[0]):
        best.setdefault(record.run.model.structure, record)
    return list(best.values())[:count]


def without_leaders(specs: Sequence[str], count: int = 3) -> tuple[tuple[str, ...], list[Record]]:
    """Specs without those that read "from-study:FOLDER", and instead of these the best runs of the search.

    Raises:
        ValueError: as `leaders`; two searches whose runs are not alike.
    """
    found: list[Record] = []
    for spec in specs:
        if spec.startswith(FROM_STUDY):
            folder = Path(spec.removeprefix(FROM_STUDY))
            if not folder.exists() and (Path("results") / folder).exists():
                folder = Path("results") / folder
            found += leaders(folder, count)
    for record in found[1:]:
        if changed := differences(_common(found[0].run.identity), _common(record.run.identity)):
            raise ValueError(f"searches of different settings cannot be compared: {'; '.join(changed)}")
    return tuple(spec for spec in specs if not spec.startswith(FROM_STUDY)), found


def as_searched(best: Sequence[Record], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the search's runs, as far as others are not given."""
    options = _common(best[0].run.options)
    if given.get("epochs") is not None:
        del options["steps"]
    return options | {name: value for name, value in given.items() if value is not None}


def alongside(best: Sequence[Record], specs: Sequence[str], options: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The best structures of a search with the widths that they were found at, after others at the same compute.

    Args:
        best: of the search.
        specs: of the others.
        options: of all runs.

    Raises:
        DoesNotFit: one has no model of that compute.
    """
    base = Run.of(options)
    macs = [record.result.macs for record in best if record.result]
    matching = Matching(base.model, base.data.load(base.seed).shape, round(fmean(macs)), granule=1)
    matched = [matching.match(Proposal(spec)) for spec in specs]
    found = [(own.spec, own.width) for own in matched] + [
        (record.run.model.structure, record.run.model.width) for record in best
    ]
    return list(dict.fromkeys(found))


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in AXES}
