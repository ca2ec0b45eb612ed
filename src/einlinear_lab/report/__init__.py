"""One self-contained page about one or several results folders: it loads nothing from the network.

page.py            figures with their numbers, tables, sections; the page that they make
plots.py           the look of all figures
overview.py        the main result, and what was run
scaling_laws.py    losses over compute, and their laws
multipliers.py     compute multipliers, by model and along frontiers
learning_rates.py  losses over the learning rate, and the best ones by width
training.py        training curves, and the load of experts
wall_clock.py      time to a loss
coord_check.py     feature updates, of a coordinate check
taxonomy.py        what the exponents of the structures have to do with their losses
structure_map.py   where structures lie in (psi, nu, omega), what they are worth, and how fast they are
tables.py          all models, all runs

A section is a function of a study that gives None where its runs have nothing to show.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from einlinear.files import write_text
from einlinear_lab.findings.coord_check import CoordinateCheck, read_updates
from einlinear_lab.findings.summary import Study, studies
from einlinear_lab.report.coord_check import coord_check
from einlinear_lab.report.learning_rates import learning_rates
from einlinear_lab.report.overview import code_warning, headline, what_was_run
from einlinear_lab.report.page import Chapter, Section, render
from einlinear_lab.report.scaling_laws import scaling, scaling_of_training
from einlinear_lab.report.structure_map import map_of_structures
from einlinear_lab.report.tables import all_models
from einlinear_lab.report.taxonomy import taxonomy
from einlinear_lab.report.training import expert_loads, training_curves
from einlinear_lab.report.wall_clock import wall_clock
from einlinear_lab.runs.records import Record
from einlinear_lab.runs.store import RUNS, Store

__all__ = ["Report", "write_report"]

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """A page, and what it is about.

    Attributes:
        path: of the page.
        studies: that it shows.
        warnings: that it begins with.
    """

    path: Path
    studies: tuple[Study, ...]
    warnings: tuple[str, ...]


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, floor: float | None = 0.0) -> Report:
    """Write the page about all runs of the folders, and about their coordinate checks.

    Args:
        folders: results folders; runs on the same data are shown together, whichever folder they are in.
        out: the file. None writes report.html into the folder, of which there must then be one.
        floor: of the scaling laws, see `laws_per_input`.

    Raises:
        ValueError: a folder has neither runs nor a coordinate check, nothing is finished, or several folders and no
            file is given.
    """
    paths = [Path(folder) for folder in folders]
    if out is None and len(paths) != 1:
        raise ValueError(f"{len(paths)} folders: name the file for the page (--out)")
    stores = [Store(path) for path in paths]
    checks, of_checks = _checks(paths)
    records, of_runs = _read(stores, {path for path, _ in checks})
    damaged = [f"{text}; it is left out" for text in (*of_checks, *of_runs)]
    found = studies(records)
    if not found and not checks:
        raise ValueError("; ".join([f"{' and '.join(map(str, paths))}: no finished runs yet", *damaged]))
    chapters = [_chapter(study, records, stores, floor) for study in found]
    chapters += [Chapter(f"Coordinate check in {path}", [coord_check(check)]) for path, check in checks]
    warnings = [*code_warning([record for study in found for record in study.records]), *damaged]
    page = render(
        title="Structured linear layers side by side",
        headline=" ".join(map(headline, found)) or "How much a step of training moves the features, by width.",
        warnings=warnings,
        chapters=chapters,
        footer=_footer(_command(paths, out, floor), records),
    )
    path = Path(out) if out is not None else paths[0] / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return Report(path, tuple(found), tuple(warnings))


def _read(stores: Sequence[Store], may_be_empty: set[Path]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    damaged: list[str] = []
    for store in stores:
        if not (store.folder / RUNS).is_dir() and store.folder not in may_be_empty:
            raise ValueError(
                f"{store.folder} holds no results of einlinear ({store.folder / RUNS} is missing); "
                "name the folder of a compare, a sweep or a search"
            )
        records += store.records()
        damaged += [*store.damaged(), *store.damaged_lines()]
    return records, damaged


def _checks(paths: Sequence[Path]) -> tuple[list[tuple[Path, CoordinateCheck]], list[str]]:
    """The coordinate checks of folders, and what is wrong with those that are damaged."""
    found, damaged = [], []
    for path in paths:
        try:
            if check := read_updates(path):
                found.append((path, check))
        except ValueError as error:
            damaged.append(str(error))
    return found, damaged


def _chapter(study: Study, records: Sequence[Record], stores: Sequence[Store], floor: float | None) -> Chapter:
    folders = {record.folder.parent.parent for record in study.records}
    commands = [command for store in stores if store.folder in folders for command in store.commands()]
    unfinished = sum(record.result is None and record.digest == study.records[0].digest for record in records)
    sections: list[Section | None] = [
        what_was_run(study, commands, unfinished),
        scaling(study, commands, floor),
        scaling_of_training(study, commands, floor),
        learning_rates(study, commands),
        training_curves(study, commands),
        expert_loads(study, commands),
        wall_clock(study, commands),
        taxonomy(study, commands),
        map_of_structures(study, commands),
        all_models(study, commands),
    ]
    return Chapter(str(study), [section for section in sections if section])


def _command(paths: Sequence[Path], out: str | Path | None, floor: float | None) -> str:
    """The command that makes the page again."""
    words = ["einlinear", "report", *map(os.fspath, paths)]
    words += [] if out is None else ["--out", os.fspath(out)]
    words += [] if floor == 0 else ["--floor", "fit" if floor is None else repr(floor)]
    return shlex.join(words)


def _footer(command: str, records: Sequence[Record]) -> dict[str, str]:
    return {
        "made by": command,
        "date": datetime.now().strftime("%d %B %Y, %H:%M"),
        "runs by": "; ".join(sorted({record.made_with for record in records})) or "–",
        "code": ", ".join(sorted({record.code for record in records})) or "–",
    }
