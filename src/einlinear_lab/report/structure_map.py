"""The map of the structures: their losses at one compute, over psi, nu and omega, and over the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear_lab.findings.structure_map import NEAR, Place, StructureMap, structure_map
from einlinear_lab.findings.summary import Study, in_words
from einlinear_lab.findings.taxonomy import EXPONENTS
from einlinear_lab.report.page import Cell, Figure, Panel, Section, Table
from einlinear_lab.report.plots import glyph, log_axis, shade, short, style, symbol
from einlinear_lab.report.taxonomy import AXES, SIGNS, effects_table

_LISTED = 20


def map_of_structures(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if eight structures or more have models of about the same compute."""
    found = {in_words(name): own for name in study.measures if (own := structure_map(study, name))}
    if not found:
        return None
    measure, first = next(iter(found.items()))
    best = first.places[0]
    text = Markup(
        "<p>{} structures at {} MACs per {}, within {:.0%}. The best is <b>{}</b> at width {}:</p>"
        "<pre>import einlinear as el\n\nel.convert(model, {!r})</pre>"
    ).format(
        len(first.places),
        short(float(f"{first.compute:.3g}")),
        study.input,
        NEAR,
        best.structure,
        best.row.run.model.width,
        best.structure,
    )
    kinds = list(dict.fromkeys(own.kind for own in first.places))
    views = {title: _panels(own, kinds, title) for title, own in found.items()}
    data = [
        {
            "structure": own.structure,
            "kind": own.kind,
            "width": own.row.run.model.width,
            "macs": own.row.result.macs,
            "measure": title,
            "loss": own.loss,
            "step_seconds": own.row.step_seconds,
            "is_on_front": own.is_on_front,
            **own.exponents,
        }
        for title, each in found.items()
        for own in each.places
    ]
    legend = ", ".join(f"{glyph(i)} {kind}" for i, kind in enumerate(kinds))
    caption = Markup(
        "Each mark is a model; the darker, the lower its loss; its shape says what its structure is: {}. The best is "
        "larger. In the last panel the line joins those that no other is both better and faster than."
    ).format(legend)
    if first.unfinished:
        caption += Markup(" Small crosses: structures whose runs ended early, or are still running ({}).").format(
            len(first.unfinished)
        )
        caption += " What exponents are worth is told by the others alone, which leaves out part of it."
    table = _table(first.places, measure)
    effects = effects_table({title: own.effects for title, own in found.items()})
    parts: list[Figure | Table] = [Figure("map", caption, views, data), table, *effects]
    return Section("Map of the structures", text, parts, commands)


def _panels(found: StructureMap, kinds: Sequence[str], title: str) -> list[Panel]:
    pairs = [Panel("", _plane(found, kinds, x, y)) for x, y in combinations(reversed(EXPONENTS), 2)]
    return [*pairs, Panel("", _front(found.places, kinds, title))]


def _plane(found: StructureMap, kinds: Sequence[str], x: str, y: str) -> go.Figure:
    figure = go.Figure()
    for spec, exponents in found.unfinished.items():
        figure.add_scatter(
            x=[exponents[x]],
            y=[exponents[y]],
            mode="markers",
            marker={"color": "#999", "symbol": "x-thin-open", "size": 6},
            hovertemplate=f"{escape(spec)}<br>not finished<extra></extra>",
        )
    for rank, own in reversed([*enumerate(found.places)]):  # the best on top
        _mark(figure, own.exponents[x], own.exponents[y], own, rank, len(found.places), kinds)
    style(figure)
    figure.update_layout(height=340, showlegend=False)
    figure.update_xaxes(title=AXES[x], range=[-0.05, 1.05])
    figure.update_yaxes(title=AXES[y], range=[-0.05, 1.05])
    return figure


def _front(places: Sequence[Place], kinds: Sequence[str], title: str) -> go.Figure:
    figure = go.Figure()
    timed = [(rank, own, 1000 * own.row.step_seconds) for rank, own in enumerate(places) if own.row.step_seconds]
    front = sorted((ms, own.loss) for _, own, ms in timed if own.is_on_front)
    if front:
        figure.add_scatter(
            x=[ms for ms, _ in front],
            y=[loss for _, loss in front],
            mode="lines",
            line={"color": "#999"},
            hoverinfo="skip",
        )
    for rank, own, ms in reversed(timed):
        _mark(figure, ms, own.loss, own, rank, len(places), kinds)
    style(figure)
    figure.update_layout(height=340, showlegend=False)
    figure.update_xaxes(**log_axis([ms for *_, ms in timed], "milliseconds per training step"))
    figure.update_yaxes(**log_axis([own.loss for own in places], title))
    return figure


def _mark(figure: go.Figure, x: float, y: float, own: Place, rank: int, count: int, kinds: Sequence[str]) -> None:
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={"color": shade(rank, count), "symbol": symbol(kinds.index(own.kind)), "size": 14 if rank == 0 else 10},
        hovertemplate=f"{escape(own.structure)}<br>{escape(own.kind)}, loss {own.loss:.4g}<extra></extra>",
    )


def _table(places: Sequence[Place], measure: str) -> Table:
    headings = ("structure", "kind", "width", "MACs", *(SIGNS[name] for name in EXPONENTS), measure)
    rows = [
        [
            Cell(own.structure, own.structure),
            Cell(own.kind, own.kind),
            Cell(f"{own.row.run.model.width}", own.row.run.model.width),
            Cell(f"{own.row.result.macs:,}", own.row.result.macs),
            *(Cell(f"{own.exponents[name]:.3g}", own.exponents[name]) for name in EXPONENTS),
            Cell(f"{own.loss:.4f}", own.loss),
        ]
        for own in places[:_LISTED]
    ]
    return Table(headings, rows, Markup("The best {}.").format(len(rows)))
