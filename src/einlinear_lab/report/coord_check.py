"""Feature updates: how much a step moves the features at every width."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear_lab.findings.coord_check import CoordinateCheck, Updates, is_change
from einlinear_lab.report.page import Cell, Figure, Panel, Section, Table
from einlinear_lab.report.plots import colour, log_axis, style, symbol


def coord_check(check: CoordinateCheck) -> Section:
    """A figure and a table of a coordinate check."""
    text = Markup("<p>A level line means that the learning rate carries over from one width to another. {}.</p>")
    caption = Markup(
        "Change of the features after the last block in one step, over their size (root mean squares), mean over the "
        "steps. Dotted: the control, in which all factors learn at the rate of a dense layer."
    )
    data = [
        {
            "structure": update.structure,
            "structure_aware": update.structure_aware,
            "width": width,
            "relative_update": value if is_change(value) else "",
        }
        for update in check.updates
        for width, value in update.by_width.items()
    ]
    figure = Figure("feature-updates", caption, {"": [Panel("", _plot(check.updates))]}, data)
    parts = (figure, _table(check.updates))
    return Section("Feature updates", text.format(check.source.rstrip(".")), parts, [check.command])


def _plot(updates: Sequence[Updates]) -> go.Figure:
    figure = go.Figure()
    names = _names(updates)
    for update in updates:
        i = names.index(update.structure)
        name = _name(update)
        figure.add_scatter(
            x=list(update.by_width),
            y=[value if is_change(value) else None for value in update.by_width.values()],
            name=name,
            mode="lines+markers",
            marker={
                "color": colour(i),
                "symbol": symbol(i) if update.structure_aware else f"{symbol(i)}-open",
                "size": 9,
            },
            line={"color": colour(i), "width": 1.5, "dash": "solid" if update.structure_aware else "dot"},
            hovertemplate=f"{escape(name)}, width %{{x}}<br>relative update %{{y:.4g}}<extra></extra>",
        )
    style(figure)
    widths = _widths(updates)
    values = [value for update in updates for value in update.by_width.values() if is_change(value)]
    figure.update_xaxes(title="width", type="log", tickvals=widths, ticktext=[str(width) for width in widths])
    figure.update_yaxes(**log_axis(values, "relative change of features in a step"))
    return figure


def _table(updates: Sequence[Updates]) -> Table:
    names, widths = _names(updates), _widths(updates)
    rows = []
    for update in updates:
        ratio = update.largest_over_smallest
        cells = [_change(update.by_width[width]) if width in update.by_width else Cell("") for width in widths]
        name = _name(update)
        last = Cell("–") if ratio is None else Cell(f"{ratio:.2f}", ratio)
        rows.append([Cell(name, name, names.index(update.structure)), *cells, last])
    return Table(("structure", *(f"width {width}" for width in widths), "largest / smallest"), rows)


def _change(value: float) -> Cell:
    return Cell(f"{value:.4g}", value) if is_change(value) or value == 0 else Cell("diverged")


def _name(update: Updates) -> str:
    return update.structure if update.structure_aware else f"{update.structure}, naive"


def _names(updates: Sequence[Updates]) -> list[str]:
    return list(dict.fromkeys(update.structure for update in updates))


def _widths(updates: Sequence[Updates]) -> list[int]:
    return sorted({width for update in updates for width in update.by_width})
