"""`einlinear fit`: its options, and what it prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.options import Floor, Folders
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import floor_of, numbers

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.findings.scaling_laws import Law, Laws

_FEW = 4  # points, of which two are needed to draw a line


def command(
    folders: Folders,
    floor: Floor = "0",
    at: Annotated[
        str | None,
        typer.Option(
            help="Also print the losses that the laws predict at this compute (in MACs), such as 1M,1G or 1e12."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Of laws over training: how far above the hull a point of the frontier may be.")
    ] = 0.02,
    window: Annotated[
        str | None, typer.Option(help="Of laws over training: the least and the most MACs, such as 1T,100T.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Of laws over training: drop the last points where that explains more.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write all numbers to this JSON file.")] = None,
) -> None:
    """Fit scaling laws to results folders, for each structure: loss = floor + scale × compute^-exponent."""
    require(LAB)
    from einlinear.files import write_json
    from einlinear_lab.findings.scaling_laws import as_json, laws_of_training, laws_per_input
    from einlinear_lab.findings.summary import studies
    from einlinear_lab.runs.store import open_store

    with user_errors():
        assumed, computes = floor_of(floor), numbers(at, "--at") or ()
        ends = numbers(window, "--window") or (0.0, math.inf)
        if len(ends) != 2:
            raise ValueError(f"--window must be two numbers, the least and the most MACs, not {window!r}")
        stores = [open_store(folder) for folder in folders]
        for text in (text for store in stores for text in (*store.damaged(), *store.damaged_lines())):
            display.warning(f"{text}; it is left out")
        found = studies(record for store in stores for record in store.records())
        if not found:
            raise ValueError(f"{' and '.join(map(str, folders))}: no finished runs yet")
    content = []
    for study in found:
        display.note(f"{study}, {len(study.records)} runs")
        final = [laws_per_input(study, measure, assumed) for measure in study.measures]
        with user_errors():
            training = laws_of_training(study, assumed, tolerance=tolerance, window=ends, prune=prune)
        laws = [*final, *([training] if training else [])]
        for own in laws:
            _print(own, computes)
        content.append({"study": str(study), "laws": [as_json(own, computes) for own in laws]})
    display.note(
        "Means over the seeds. × compute: how many times the compute dense needs for the same loss, at the most "
        "compute at which its runs tell."
    )
    if out:
        with user_errors():
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, content)
        display.note(f"Numbers: {out}")


def _print(laws: Laws, computes: Sequence[float]) -> None:
    from einlinear_lab.findings.summary import in_words

    display.note(f"\n{in_words(laws.measure)} over {laws.compute}")
    headings = ["structure", "exponent", "95 % interval", "R²", "scale", "floor", "points", "× compute"]
    headings += [f"at {compute:.3g}" for compute in computes]
    display.show(headings, [_row(law, computes) for law in laws.laws])
    for law in laws.laws:
        if law.fit is None:
            display.note(f"{law.curve.name}: no exponent: {law.why}")
        elif len(law.fit.frontier.index) <= _FEW:
            display.note(f"{law.curve.name}: {len(law.fit.frontier.index)} points: R² means little, go by the interval")


def _row(law: Law, computes: Sequence[float]) -> list[str]:
    if law.fit is None:
        return [law.curve.name, *["–"] * (7 + len(computes))]
    numbers, interval = law.fit.law, law.interval
    doubt = " (not identified)" if numbers.floor_identified is False else ""
    predictions = [law.predict(compute) for compute in computes]
    return [
        law.curve.name,
        f"{numbers.exponent:.4f}",
        f"{interval.low:.4f} to {interval.high:.4f}, {interval.source}" if interval else "–",
        "–" if math.isnan(numbers.r_squared) else f"{numbers.r_squared:.4f}",
        f"{numbers.scale:.4g}",
        f"{numbers.floor:.4g}{doubt}",
        str(len(law.fit.frontier.index)),
        str(law.multiplier.multiplier) if law.multiplier else "–",
        *(f"{found.loss:.4g}" if found else "–" for found in predictions),
    ]
