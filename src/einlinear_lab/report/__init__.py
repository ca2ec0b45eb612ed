"""The report: results folders as figures and tables on one self-contained HTML page.

A section's file draws what `einlinear_lab.analysis` computes; it returns None without data.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from einlinear.files import write_text
from einlinear_lab.analysis.comparison import Comparison, compare_runs
from einlinear_lab.coordinate_check import CoordinateCheck, read_updates
from einlinear_lab.report import (
    feature_updates,
    learning_rate_sweeps,
    loss_over_compute,
    loss_over_exponents,
    loss_over_time,
    overview,
    training_curves,
)
from einlinear_lab.report.page import Chapter, render
from einlinear_lab.runs.records import Record
from einlinear_lab.runs.store import Store, open_store

__all__ = ["Report", "write_report"]

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """The file of a page, the comparisons on it, and the warnings at its top."""

    path: Path
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, floor: float | None = 0.0) -> Report:
    """Write the page about all runs and coordinate checks of results folders.

    Args:
        folders: results folders; runs on the same data are compared, whichever folder they are in.
        out: the file to write. None writes report.html into the folder, of which there must be only one.
        floor: irreducible loss of the scaling laws, see `laws_per_input`.

    Raises:
        ValueError: a folder has neither runs nor a coordinate check, no run is finished, or `out` is missing.
    """
    paths = [Path(folder) for folder in folders]
    if out is None and len(paths) != 1:
        raise ValueError(f"{len(paths)} folders: name the file for the page (--out)")
    checks: dict[Path, CoordinateCheck] = {}
    damaged: list[str] = []
    for path in paths:
        try:
            if check := read_updates(path):
                checks[path] = check
        except ValueError as error:
            damaged.append(str(error))
    stores = [Store(path) if path in checks else open_store(path) for path in paths]
    damaged += [text for store in stores for text in (*store.damaged(), *store.damaged_lines())]
    damaged = [f"{text}; it is left out" for text in damaged]
    comparisons = compare_runs(record for store in stores for record in store.records())
    if not comparisons and not checks:
        raise ValueError("; ".join([f"{' and '.join(map(str, paths))}: no finished runs yet", *damaged]))
    chapters = [_chapter(comparison, stores, floor) for comparison in comparisons]
    for path, check in checks.items():
        chapters.append(Chapter(f"Coordinate check in {path}", [feature_updates.section(check)], [check.command]))
    records = [record for comparison in comparisons for record in comparison.records]
    warnings = [*_code_warning(records), *damaged]
    command = ["einlinear", "report", *map(os.fspath, paths), *([] if out is None else ["--out", os.fspath(out)])]
    command += [] if floor == 0 else ["--floor", "fit" if floor is None else repr(floor)]
    headline = " ".join(map(overview.headline, comparisons)) or "Relative feature update per training step, by width."
    footer = {
        "command": shlex.join(command),
        "date": datetime.now().strftime("%d %B %Y, %H:%M"),
        "environment of the runs": "; ".join(sorted({record.made_with for record in records})) or "–",
        "code of the runs": ", ".join(sorted({record.code for record in records})) or "–",
    }
    path = Path(out) if out is not None else paths[0] / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(headline, warnings, chapters, footer))
    return Report(path, tuple(comparisons), tuple(warnings))


def _chapter(comparison: Comparison, stores: Sequence[Store], floor: float | None) -> Chapter:
    folders = {record.folder.parent.parent for record in comparison.records}
    commands = [command for store in stores if store.folder in folders for command in store.commands()]
    sections = [
        overview.setup_section(comparison, commands),
        loss_over_compute.section_per_input(comparison, floor),
        loss_over_compute.section_of_training(comparison, floor),
        loss_over_time.section(comparison),
        learning_rate_sweeps.section(comparison),
        training_curves.section(comparison),
        training_curves.section_of_experts(comparison),
        loss_over_exponents.section_at_equal_compute(comparison),
        loss_over_exponents.section(comparison),
        overview.models_section(comparison),
    ]
    return Chapter(str(comparison), [section for section in sections if section], commands)


def _code_warning(records: Sequence[Record]) -> list[str]:
    """Return the warning that several versions of the code made the runs; none for a single version."""
    versions = Counter(record.code for record in records)
    if len(versions) < 2:
        return []
    listed = ", ".join(f"{count} by {version}" for version, count in sorted(versions.items()))
    return [
        f"These runs were made by {len(versions)} versions of the code ({listed}) and may not be comparable. The table "
        "of all runs lists the version of every run."
    ]
