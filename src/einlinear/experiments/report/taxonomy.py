"""The taxonomy: what the exponents psi, nu and omega of the structures have to do with their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear.experiments.findings.scaling import Effect, exponent_effects
from einlinear.experiments.findings.summary import Curve, Study, in_words
from einlinear.experiments.report.page import Cell, Figure, Panel, Section, Table
from einlinear.experiments.report.plots import colour, log_axis, short, style, symbol
from einlinear.experiments.runs.models import DENSE
from einlinear.structures import structure

AT_LEAST = 5  # structures
_EXPONENTS = {
    "omega": "ω: parameters / MACs = n^−ω",
    "psi": "ψ: rank = n^ψ",
    "nu": "ν: MACs = n^(1+ν)",
}


@dataclass(frozen=True)
class _Point:
    """A structure at the compute that all have in common."""

    index: int
    curve: Curve
    exponents: dict[str, float]
    loss: float


def taxonomy(study: Study, commands: Sequence[str]) -> Section | None:
    """Where five structures or more have models around the same compute."""
    found = {measure: _points(study, measure) for measure in study.measures}
    found = {measure: own for measure, own in found.items() if len({p.curve.structure for p in own[1]}) >= AT_LEAST}
    if not found:
        return None
    compute = next(iter(found.values()))[0]
    text = Markup(
        "<p>Losses at {} MACs per {}, the most compute that all structures reach, interpolated between models in "
        "log-log space. ω = 0: no parameter is used twice; ψ = 1: full rank; ν = 1: the compute of dense.</p>"
    ).format(short(float(f"{compute:.3g}")), study.input)
    views = {
        in_words(measure): [Panel("", _plot(points, name, in_words(measure))) for name in _EXPONENTS]
        for measure, (_, points) in found.items()
    }
    data = [
        {"curve": p.curve.name, "structure": p.curve.structure, "macs": macs, "measure": measure, "loss": p.loss}
        | p.exponents
        for measure, (macs, points) in found.items()
        for p in points
    ]
    figure = Figure("taxonomy", Markup("Down is better; one mark per structure, the same in all panels."), views, data)
    table = _table({in_words(measure): points for measure, (_, points) in found.items()})
    effects = _effects({in_words(measure): points for measure, (_, points) in found.items()})
    return Section("Taxonomy of the structures", text, [figure, table, *effects], commands)


def _points(study: Study, measure: str) -> tuple[float, list[_Point]]:
    """The compute, and the curves that have a loss there; naive ones are controls and left out."""
    curves = []
    for i, curve in enumerate(study.curves):
        means = [(row.result.macs, mean) for row in curve.best if (mean := row.mean(measure))]
        if means and curve.options.get("structure_aware", True) and (exponents := _exponents(curve)):
            curves.append((i, curve, exponents, sorted(means)))
    compute = float(min((means[-1][0] for *_, means in curves), default=0))
    return compute, [
        _Point(i, curve, exponents, _loss_at(compute, means))
        for i, curve, exponents, means in curves
        if means[0][0] <= compute
    ]


def _loss_at(compute: float, means: Sequence[tuple[float, float]]) -> float:
    macs, losses = np.log(np.array(means, dtype=float)).T
    return math.exp(np.interp(math.log(compute), macs, losses))


def _exponents(curve: Curve) -> dict[str, float]:
    """Of its widest model; none of a family that is not registered here."""
    model = curve.best[-1].run.model
    try:
        found = structure(curve.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(found, name) for name in _EXPONENTS}


def _plot(points: Sequence[_Point], name: str, measure: str) -> go.Figure:
    figure = go.Figure()
    for point in points:
        figure.add_scatter(
            x=[point.exponents[name]],
            y=[point.loss],
            mode="markers",
            marker={"color": colour(point.index), "symbol": symbol(point.index), "size": 10},
            name=point.curve.name,
            hovertemplate=f"{escape(point.curve.name)}<br>%{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
    style(figure)
    figure.update_layout(height=320, showlegend=False)
    figure.update_xaxes(title=_EXPONENTS[name], range=[-0.05, 1.05])
    figure.update_yaxes(**log_axis([point.loss for point in points], measure))
    return figure


def _table(points: Mapping[str, Sequence[_Point]]) -> Table:
    """The structures, which is the legend of the figure as well."""
    rows = [
        [
            Cell(own[0].curve.name, own[0].curve.name, own[0].index),
            *(Cell(f"{own[0].exponents[name]:.3g}", own[0].exponents[name]) for name in _EXPONENTS),
            *(Cell(f"{point.loss:.4f}", point.loss) for point in own),
        ]
        for own in zip(*points.values(), strict=True)
    ]
    return Table(("structure", "ω", "ψ", "ν", *points), rows)


def _effects(points: Mapping[str, Sequence[_Point]]) -> list[Table]:
    """The regression on all three at once; where dense is among the structures."""
    rows = []
    for measure, own in points.items():
        dense = next((point.loss for point in own if point.curve.structure == DENSE), None)
        if dense is None:
            return []
        psi, nu, omega = ([point.exponents[name] for point in own] for name in ("psi", "nu", "omega"))
        effects = exponent_effects(psi, nu, omega, [point.loss for point in own], dense)
        for sign, effect in (("ω", effects.omega), ("ψ", effects.psi), ("ν", effects.nu)):
            r_squared = Cell(f"{effects.r_squared:.2f}", effects.r_squared)
            rows.append([Cell(f"{sign}, {measure}", f"{sign}, {measure}"), *_effect(effect), r_squared])
    note = Markup(
        "Least squares of log(loss / loss of dense) on ψ − 1, ν − 1 and ω together. One unit more of an exponent "
        "multiplies the loss by e to its effect. –: these structures do not tell it from the others."
    )
    return [Table(("exponent", "effect", "95 % interval", "R² of all three"), rows, note)]


def _effect(effect: Effect) -> list[Cell]:
    if math.isnan(effect.value):
        return [Cell("–"), Cell("–")]
    ends = effect.interval
    return [Cell(f"{effect.value:+.3f}", effect.value), Cell(f"{ends.low:+.3f} to {ends.high:+.3f}" if ends else "–")]
