"""Time to a loss: which structure is there first, in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from einlinear_lab.findings.summary import Curve, Study, in_words
from einlinear_lab.findings.wall_clock import Arrival, arrival, losses_to_reach
from einlinear_lab.report.page import Cell, Section, Table
from einlinear_lab.runs.models import DENSE


def wall_clock(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if runs were evaluated while they were trained and two curves reach a loss."""
    losses = losses_to_reach(study)
    if not losses:
        return None
    found = {curve.name: [arrival(curve, study.error, loss) for loss in losses] for curve in study.curves}
    dense = next((found[curve.name] for curve in study.curves if curve.structure == DENSE), [None] * len(losses))
    headings = ["structure", *(f"{in_words(study.error)} {loss:.4g}" for loss in losses), f"{study.input}s a second"]
    rows = [_row(i, curve, found[curve.name], dense) for i, curve in enumerate(study.curves)]
    note = Markup(
        "Seconds of training, without data and evaluations, that the fastest model of a structure needs, its width, "
        "and how many times as long dense needs. The last column is the speed of the model that reaches the lowest of "
        "these losses. Runs that shared a machine slowed each other down alike: compare within a page only."
    )
    return Section("Time to a loss", Markup(), [Table(headings, rows, note)], commands)


def _row(i: int, curve: Curve, own: Sequence[Arrival | None], dense: Sequence[Arrival | None]) -> list[Cell]:
    last = next((found for found in reversed(own) if found), None)
    speed = last.inputs_per_second if last else None
    return [
        Cell(curve.name, curve.name, i),
        *(_cell(found, other) for found, other in zip(own, dense, strict=True)),
        Cell(f"{speed:,.0f}", speed) if speed else Cell("–"),
    ]


def _cell(found: Arrival | None, dense: Arrival | None) -> Cell:
    if found is None:
        return Cell("–")
    gain = f", {dense.seconds / found.seconds:.2f}×" if dense else ""
    return Cell(f"{found.seconds:.3g} s (width {found.row.run.model.width}{gain})", found.seconds)
