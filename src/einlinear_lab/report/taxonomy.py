"""The taxonomy: the losses of structures at the same compute over their exponents psi, nu and omega."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear_lab.findings.summary import Study, in_words
from einlinear_lab.findings.taxonomy import EXPONENTS, Entry, Taxonomy, taxonomy_of
from einlinear_lab.report.page import Cell, Figure, Panel, Section, Table
from einlinear_lab.report.plots import colour, log_axis, short, style, symbol
from einlinear_lab.scaling import Effect, ExponentEffects

SIGNS = {"omega": "ω", "psi": "ψ", "nu": "ν"}
AXES = {
    "omega": "ω: parameters / MACs = n^−ω",
    "psi": "ψ: rank = n^ψ",
    "nu": "ν: MACs = n^(1+ν)",
}


def taxonomy(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if five structures or more have models around the same compute."""
    found = {measure: own for measure in study.measures if (own := taxonomy_of(study, measure))}
    if not found:
        return None
    text = Markup(
        "<p>Losses at {} MACs per {}, the most compute that all structures reach, interpolated between models in "
        "log-log space. ω = 0: no parameter is used twice; ψ = 1: full rank; ν = 1: the compute of dense.</p>"
    ).format(short(float(f"{next(iter(found.values())).compute:.3g}")), study.input)
    marks = {curve.name: i for i, curve in enumerate(study.curves)}
    in_titles = {in_words(measure): own for measure, own in found.items()}
    views = {
        title: [Panel("", _plot(own.entries, marks, name, title)) for name in EXPONENTS]
        for title, own in in_titles.items()
    }
    data = [
        {
            "curve": entry.curve.name,
            "structure": entry.curve.structure,
            "macs": own.compute,
            "measure": measure,
            "loss": entry.loss,
            **entry.exponents,
        }
        for measure, own in found.items()
        for entry in own.entries
    ]
    figure = Figure("taxonomy", Markup("Down is better; one mark per structure, the same in all panels."), views, data)
    parts: list[Figure | Table] = [
        figure,
        _table(in_titles, marks),
        *effects_table({title: own.effects for title, own in in_titles.items()}),
    ]
    return Section("Taxonomy of the structures", text, parts, commands)


def _plot(entries: Sequence[Entry], marks: Mapping[str, int], exponent: str, measure: str) -> go.Figure:
    figure = go.Figure()
    for own in entries:
        i = marks[own.curve.name]
        figure.add_scatter(
            x=[own.exponents[exponent]],
            y=[own.loss],
            mode="markers",
            marker={"color": colour(i), "symbol": symbol(i), "size": 10},
            name=own.curve.name,
            hovertemplate=f"{escape(own.curve.name)}<br>%{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
    style(figure)
    figure.update_layout(height=320, showlegend=False)
    figure.update_xaxes(title=AXES[exponent], range=[-0.05, 1.05])
    figure.update_yaxes(**log_axis([own.loss for own in entries], measure))
    return figure


def _table(found: Mapping[str, Taxonomy], marks: Mapping[str, int]) -> Table:
    """The table of the structures, which is the legend of the figure as well."""
    exponents = {own.curve.name: own.exponents for each in found.values() for own in each.entries}
    losses = [{own.curve.name: own.loss for own in each.entries} for each in found.values()]
    rows = [
        [
            Cell(name, name, marks[name]),
            *(Cell(f"{own[exponent]:.3g}", own[exponent]) for exponent in EXPONENTS),
            *(Cell(f"{of[name]:.4f}", of[name]) if name in of else Cell("–") for of in losses),
        ]
        for name, own in exponents.items()
    ]
    return Table(("structure", *(SIGNS[name] for name in EXPONENTS), *found), rows)


def effects_table(found: Mapping[str, ExponentEffects | None]) -> list[Table]:
    """The table of the regression on all three at once, by measure, if there is one."""
    rows = []
    for measure, own in found.items():
        if own is None:
            continue
        r_squared = Cell(f"{own.r_squared:.2f}", own.r_squared) if math.isfinite(own.r_squared) else Cell("–")
        for name in EXPONENTS:
            title = f"{SIGNS[name]}, {measure}"
            rows.append([Cell(title, title), *_effect(getattr(own, name)), r_squared])
    note = Markup(
        "Least squares of log(loss / loss of dense) on ψ − 1, ν − 1 and ω together. One unit more of an exponent "
        "multiplies the loss by e to its effect. –: these structures do not tell it from the others."
    )
    return [Table(("exponent", "effect", "95 % interval", "R² of all three"), rows, note)] if rows else []


def _effect(effect: Effect) -> list[Cell]:
    ends = effect.interval
    if ends is None:  # as many structures as coefficients fit any
        return [Cell("–"), Cell("–")]
    return [Cell(f"{effect.value:+.3f}", effect.value), Cell(f"{ends.low:+.3f} to {ends.high:+.3f}")]
