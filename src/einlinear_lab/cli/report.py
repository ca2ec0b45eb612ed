"""`einlinear report`: options and printed table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.arguments import Floor, Folders
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import floor_of

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.report.comparison import Comparison

PageFile = Annotated[
    Path | None,
    typer.Option(help="The page to write. Default: report.html in the folder; required for several folders."),
]


def command(folders: Folders, out: PageFile = None, floor: Floor = "0") -> None:
    """Print a table of the models in results folders, and write a page about all their runs."""
    require(LAB)
    from einlinear_lab.report import write_report

    with user_errors():
        report = write_report(folders, out, floor_of(floor))
    for comparison in report.comparisons:
        _print(comparison)
    for warning in report.warnings:
        display.warning(warning)
    display.note(f"Report: {report.path}")


def _print(comparison: Comparison) -> None:
    """Print every model, at its best learning rate where there are several."""
    from einlinear_lab.report.comparison import metric_title
    from einlinear_lab.report.overview import model_columns

    best = [group for curve in comparison.curves for group in curve.best]
    columns = model_columns(comparison, best, {"compute multiplier": comparison.error})
    rows = zip(*([cell.text for cell in cells] for cells in columns.values()), strict=True)
    display.note(f"{comparison}{', every model at its best learning rate' if 'lr' in comparison.varied else ''}:")
    display.show(list(columns), list(rows))
    display.note(
        f"Compute multiplier: how many times these MACs dense needs for the same {metric_title(comparison.error)}."
    )
    display.note("MB: on a GPU the peak memory of a step; on a CPU parameters, gradients and optimizer state.\n")
