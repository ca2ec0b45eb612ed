"""The best structures that a search has found, read from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from einlinear.experiments.runs.records import Record
from einlinear.experiments.runs.store import open_store

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


def with_leaders(specs: Sequence[str], count: int = 3) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    """Specs without those that read "from-study:FOLDER", and for these the best structures of the search with the
    widths that they were found at.

    Raises:
        ValueError: as `leaders`.
    """
    found: dict[tuple[str, int], None] = {}
    for spec in specs:
        if spec.startswith(FROM_STUDY):
            folder = Path(spec.removeprefix(FROM_STUDY))
            if not folder.exists() and (Path("results") / folder).exists():
                folder = Path("results") / folder
            found |= {(own.run.model.structure, own.run.model.width): None for own in leaders(folder, count)}
    return tuple(spec for spec in specs if not spec.startswith(FROM_STUDY)), tuple(found)
