"""`einlinear report`, `einlinear map` and `einlinear fit`: tables, laws and pages of results folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import Folders, floor_of, numbers

if TYPE_CHECKING:  # heavy: imported by the commands themselves
    from einlinear_lab.analysis.comparison import Comparison
    from einlinear_lab.analysis.curve_fits import ScalingLaws

# Of a map.
_ROWS = 10
# R² of so few points says little: two of them make a line.
_FEW_POINTS = 4
_PageFile = Annotated[
    Path | None,
    typer.Option(help="The page to write. Default: report.html in the folder; required for several folders."),
]
_Floor = Annotated[
    str, typer.Option(help="The loss that scaling laws approach but never reach: a number, or fit to fit it as well.")
]


def report_command(folders: Folders, out: _PageFile = None, floor: _Floor = "0") -> None:
    """Print a table of the models in results folders, and write a page about all their runs."""
    require(LAB)
    from einlinear_lab.report import write_report

    with display.user_errors():
        report = write_report(folders, out, floor_of(floor))
    for comparison in report.comparisons:
        _print_models(comparison)
    for warning in report.warnings:
        display.warning(warning)
    display.note(f"Report: {report.path}")


def _print_models(comparison: Comparison) -> None:
    """Print every model, at its best learning rate where there are several."""
    from einlinear_lab.analysis.comparison import metric_title
    from einlinear_lab.analysis.model_table import model_columns

    best = [group for curve in comparison.curves for group in curve.best]
    display.note(f"{comparison}{', every model at its best learning rate' if 'lr' in comparison.varied else ''}:")
    display.show_columns(model_columns(comparison, best, {"": comparison.metric}))
    error = metric_title(comparison.metric)
    display.note(f"Compute multiplier: how many times these MACs dense needs for the same {error}.")
    display.note("Time multiplier: the same for the time of training, if the runs took turns (--interleave).")
    display.note("MB: on a GPU the peak memory of a step; on a CPU parameters, gradients and optimizer state.\n")


def map_command(folders: Folders, out: _PageFile = None) -> None:
    """Map a search: the exponents of its structures against their loss."""
    require(LAB)
    from einlinear_lab.analysis.comparison import compare_runs, metric_title
    from einlinear_lab.analysis.structure_map import MIN_STRUCTURES, coefficient_columns, map_columns, map_of
    from einlinear_lab.report import write_report
    from einlinear_lab.runs.store import open_store

    with display.user_errors():
        comparisons = compare_runs(record for folder in folders for record in open_store(folder).records())
        maps = [(comparison, map_) for comparison in comparisons if (map_ := map_of(comparison, comparison.metric))]
        if not maps:
            raise ValueError(
                f"{' and '.join(map(str, folders))}: a map needs {MIN_STRUCTURES} structures of about the same MACs, "
                "each shared by all layers of a model, and errors above 0"
            )
        report = write_report(folders, out)
    for comparison, map_ in maps:
        error = metric_title(comparison.metric)
        display.note(f"{comparison}: {len(map_.points)} structures at {map_.compute:,.0f} MACs per {comparison.input}")
        display.show_columns(map_columns(map_.points[:_ROWS], error))
        display.show_columns(coefficient_columns({error: map_.regression}))
        if map_.unfinished:
            display.note(f"{len(map_.unfinished)} more structures are left out: pruned or not finished.")
        best = map_.points[0].structure
        display.note(f"Lowest {error}:\n    import einlinear as el\n    el.convert(model, {best!r})\n")
    for warning in report.warnings:
        display.warning(warning)
    display.note(f"Report: {report.path}")


def fit_command(
    folders: Folders,
    floor: _Floor = "0",
    at: str | None = None,
    tolerance: float = 0.02,
    window: str | None = None,
    prune: Annotated[bool, typer.Option("--prune")] = False,
    out: Path | None = None,
) -> None:
    """Fit scaling laws to results folders, for each structure: loss = floor + scale × compute^-exponent.

    Args:
        at: Also print the predicted losses at this compute (in MACs), such as 1M,1G or 1e12.
        tolerance: Training laws: largest relative excess over the hull of a point of the frontier.
        window: Training laws: least and most MACs of the frontier, such as 1T,100T.
        prune: Training laws: drop last points while R² grows.
        out: Also write all numbers to this JSON file.
    """
    require(LAB)
    from einlinear.files import write_json
    from einlinear_lab.analysis.comparison import compare_runs
    from einlinear_lab.analysis.curve_fits import laws_as_json, laws_of_training, laws_per_input
    from einlinear_lab.runs.store import open_store

    with display.user_errors():
        assumed, computes = floor_of(floor), numbers(at, "--at") or ()
        ends = numbers(window, "--window") or (0.0, math.inf)
        if len(ends) != 2:
            raise ValueError(f"--window must be two numbers, the least and the most MACs, not {window!r}")
        stores = [open_store(folder) for folder in folders]
        for text in (text for store in stores for text in (*store.damaged(), *store.damaged_lines())):
            display.warning(f"{text}; it is left out")
        comparisons = compare_runs(record for store in stores for record in store.records())
        if not comparisons:
            raise ValueError(f"{' and '.join(map(str, folders))}: no finished runs yet")
    content = []
    for comparison in comparisons:
        display.note(f"{comparison}, {len(comparison.records)} runs")
        with display.user_errors():
            training = laws_of_training(comparison, assumed, tolerance=tolerance, window=ends, prune=prune)
        laws = [laws_per_input(comparison, metric, assumed) for metric in comparison.metrics]
        laws += [training] if training else []
        for law in laws:
            _print_laws(law, computes)
        content.append({"comparison": str(comparison), "laws": [laws_as_json(law, computes) for law in laws]})
    display.note(
        "Means over the seeds. Compute multiplier: how many times the compute dense needs for the same loss, at the "
        "largest compute that the dense frontier covers."
    )
    if out:
        with display.user_errors():
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, content)
        display.note(f"Numbers: {out}")


def _print_laws(laws: ScalingLaws, computes: Sequence[float]) -> None:
    from einlinear_lab.analysis.columns import Column
    from einlinear_lab.analysis.comparison import metric_title
    from einlinear_lab.analysis.curve_fits import law_columns

    display.note(f"\n{metric_title(laws.metric)} over {laws.compute}")
    columns = [Column.of("structure", (fit.curve.name for fit in laws.curves)), *law_columns(laws, digits=4)]
    for compute in computes:
        losses = [found.loss if (found := fit.predict(compute)) else None for fit in laws.curves]
        columns.append(Column.of(f"at {compute:.3g}", losses, ".4g"))
    display.show_columns(columns)
    notes = []
    for fit in laws.curves:
        if fit.fit is None:
            notes.append(f"{fit.curve.name}: no exponent: {fit.reason}")
        elif (points := len(fit.fit.frontier.index)) <= _FEW_POINTS:
            notes.append(f"{fit.curve.name}: R² of {points} points means little, rely on the interval")
    for text in notes:
        display.note(text)
