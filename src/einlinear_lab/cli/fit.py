"""`einlinear fit`: options and printed tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.arguments import Floor, Folders
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import floor_of, numbers

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.report.scaling_laws import ScalingLaws

# R² of so few points says little: two of them make a line
_FEW_POINTS = 4


def command(
    folders: Folders,
    floor: Floor = "0",
    at: Annotated[
        str | None,
        typer.Option(help="Also print the predicted losses at this compute (in MACs), such as 1M,1G or 1e12."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Training laws: largest relative excess over the hull of a point of the frontier.")
    ] = 0.02,
    window: Annotated[
        str | None, typer.Option(help="Training laws: least and most MACs of the frontier, such as 1T,100T.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Training laws: drop last points while R² grows.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write all numbers to this JSON file.")] = None,
) -> None:
    """Fit scaling laws to results folders, for each structure: loss = floor + scale × compute^-exponent."""
    require(LAB)
    from einlinear.files import write_json
    from einlinear_lab.report.comparison import compare_runs
    from einlinear_lab.report.scaling_laws import laws_as_json, laws_of_training, laws_per_input
    from einlinear_lab.runs.store import open_store

    with user_errors():
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
        with user_errors():
            training = laws_of_training(comparison, assumed, tolerance=tolerance, window=ends, prune=prune)
        laws = [laws_per_input(comparison, metric, assumed) for metric in comparison.metrics]
        laws += [training] if training else []
        for law in laws:
            _print(law, computes)
        content.append({"comparison": str(comparison), "laws": [laws_as_json(law, computes) for law in laws]})
    display.note(
        "Means over the seeds. Compute multiplier: how many times the compute dense needs for the same loss, at the "
        "largest compute that the dense frontier covers."
    )
    if out:
        with user_errors():
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, content)
        display.note(f"Numbers: {out}")


def _print(laws: ScalingLaws, computes: Sequence[float]) -> None:
    from einlinear_lab.report.comparison import metric_title
    from einlinear_lab.report.scaling_laws import LAW_HEADINGS, law_cells

    display.note(f"\n{metric_title(laws.metric)} over {laws.compute}")
    rows, notes = [], []
    for fit in laws.curves:
        name, cells = fit.curve.name, law_cells(fit, digits=4)
        predictions = [fit.predict(compute) for compute in computes]
        texts = [cells[heading].text if cells else "–" for heading in LAW_HEADINGS]
        rows.append([name, *texts, *(f"{found.loss:.4g}" if found else "–" for found in predictions)])
        if fit.fit is None:
            notes.append(f"{name}: no exponent: {fit.reason}")
        elif (points := len(fit.fit.frontier.index)) <= _FEW_POINTS:
            notes.append(f"{name}: R² of {points} points means little, rely on the interval")
    display.show(["structure", *LAW_HEADINGS, *(f"at {compute:.3g}" for compute in computes)], rows)
    for text in notes:
        display.note(text)
