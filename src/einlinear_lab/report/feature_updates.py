"""Feature updates by width, of a coordinate check."""

from __future__ import annotations

from functools import partial

from markupsafe import Markup, escape

from einlinear_lab.coordinate_check import CoordinateCheck, is_update
from einlinear_lab.report.charts import Chart, colour, log_axis, size_axis, symbol, trace
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable


def section(check: CoordinateCheck) -> Section:
    """Show the updates of every structure, and the naive controls."""
    updates = check.updates
    structures = list(dict.fromkeys(update.structure for update in updates))
    widths = sorted({width for update in updates for width in update.by_width})
    traces, data, rows = [], [], []
    for update in updates:
        i, name = structures.index(update.structure), update.name
        values = [value if is_update(value) else None for value in update.by_width.values()]
        label = f"{escape(name)}, width %{{x}}<br>relative update %{{y:.4g}}"
        draw = partial(trace, update.by_width, values, colour(i), label, name=name, showlegend=True, line=1.5)
        if update.structure_aware:
            traces.append(draw(symbol=symbol(i)))
        else:
            traces.append(draw(symbol=f"{symbol(i)}-open", line_dash="dot"))
        run = {"structure": update.structure, "structure_aware": update.structure_aware}
        for width, value in zip(update.by_width, values, strict=True):
            data.append({**run, "width": width, "relative_update": "" if value is None else value})
        cells = (_cell(update.by_width.get(width)) for width in widths)
        rows.append([Cell(name, name, i), *cells, Cell.of(update.max_over_min, ".2f")])
    shown = [value for update in updates for value in update.by_width.values() if is_update(value)]
    caption = Markup(
        "Root mean square of the change of the features after the last block in one step, divided by that of the "
        "features; mean over the steps. Dotted: the naive control, in which all factors have the learning rate of a "
        "dense layer."
    )
    text = Markup("<p>A horizontal line means that the learning rate transfers across widths. {}.</p>")
    chart = Chart(traces, size_axis("width", widths), log_axis(shown, "relative feature update per step"))
    table = SortableTable(("structure", *(f"width {width}" for width in widths), "largest / smallest"), rows)
    figures = [Figure("feature-updates", caption, {"": [chart]}, data)]
    return Section("Feature updates by width", text.format(check.source.rstrip(".")), figures, [table])


def _cell(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell.of(value, ".4g") if is_update(value) or value == 0 else Cell("diverged")
