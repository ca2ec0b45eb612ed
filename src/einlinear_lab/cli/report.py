"""`einlinear report`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.options import Floor, Folders
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import floor_of

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.findings.summary import Study


def command(
    folders: Folders,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: report.html in the folder; of several folders it has to be given."
        ),
    ] = None,
    floor: Floor = "0",
) -> None:
    """Print a table of the models in results folders, and write a page about all their runs."""
    require(LAB)
    from einlinear_lab.report import write_report

    with user_errors():
        made = write_report(folders, out, floor_of(floor))
    for study in made.studies:
        _print(study)
    for warning in made.warnings:
        display.warning(warning)
    display.note(f"Report: {made.path}")


def _print(study: Study) -> None:
    """Every model, at its best learning rate where there are several."""
    from einlinear_lab.findings.summary import in_words

    measures = study.all_measures
    options = [name for name in study.varied if name not in ("structure", "width", "seed")]
    rows = []
    for row in (row for curve in study.curves for row in curve.best):
        means = [row.mean(measure) for measure in measures]
        seconds = row.step_seconds
        rows.append(
            [
                row.run.model.structure,
                str(row.run.model.width),
                *("–" if (given := row.run.identity.get(name)) is None else str(given) for name in options),
                f"{row.result.params:,}",
                f"{row.result.macs:,}",
                *("diverged" if mean is None else f"{mean:.4f}" for mean in means),
                str(row.multipliers.get(study.error, "–")),
                "–" if seconds is None else f"{1000 * seconds:.1f}",
                "–" if row.result.memory is None else f"{row.result.memory / 1e6:,.1f}",
                row.seed_count,
            ]
        )
    names = (*(name.replace("_", " ") for name in options), "params", "MACs", *map(in_words, measures))
    display.note(f"{study}{', every model at its best learning rate' if 'lr' in study.varied else ''}:")
    display.show(("structure", "width", *names, "× compute", "ms/step", "MB", "seeds"), rows)
    display.note(f"× compute: how many times these MACs dense needs for the same {in_words(study.error)}.")
    display.note("MB: on a GPU the most that a step took; on a CPU parameters, gradients and the optimizer's state.\n")
