"""Losses over compute: every model, and the frontier and the law of every structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import plotly.graph_objects as go
from markupsafe import Markup

from einlinear_lab.findings.scaling_laws import Law, Laws, laws_of_training, laws_per_input
from einlinear_lab.findings.summary import TRAIN_LOSS, Study, in_words, result, value
from einlinear_lab.report.multipliers import multipliers_of_frontiers, multipliers_of_models, with_interval
from einlinear_lab.report.page import (
    Cell,
    CsvRow,
    Figure,
    Panel,
    Section,
    Table,
    csv_row,
    hover,
    hover_of_mean,
)
from einlinear_lab.report.plots import colour, log_axis, style, symbol

_LAW = Markup("loss = {floor}scale × MACs<sup>−exponent</sup>")
_MODELS = "<b>Frontier</b>: the models that no cheaper one of the same structure beats, means over the seeds. "
_HULL = (
    "<b>Frontier</b>: the points on the lower convex hull of log loss over log MACs, or at most 2 % above it, of means "
    "over the seeds (arXiv 2410.02117). "
)
_NOTE = Markup(
    "<b>Exponent</b>: of the least-squares line through these, "
    "{law}. <b>95 % interval</b>: from resampling the seeds where every model has several, otherwise from the "
    "regression, as if points were independent. <b>× compute</b>: how many times the compute dense needs for the same "
    "loss, at the most compute at which the frontier of dense tells."
)


def scaling(study: Study, commands: Sequence[str], floor: float | None = 0.0) -> Section | None:
    """The section on final losses over the compute of an input, if a structure has models of two sizes or more."""
    if not any(len({row.result.macs for row in curve.best}) > 1 for curve in study.curves):
        return None
    laws = {in_words(measure): laws_per_input(study, measure, floor) for measure in study.measures}
    text = Markup("<p>Every model{} by the compute of one {}.</p>").format(
        " at the learning rate with its lowest error," if "lr" in study.varied else "", study.input
    )
    figures = [
        Figure(
            f"loss-over-macs-per-{study.input}",
            Markup(
                "Down and to the left is better. Filled marks: means over the seeds; open marks: single seeds; lines: "
                "power laws through the frontier."
            ),
            {name: [Panel("", _final_losses(own))] for name, own in laws.items()},
            _final_data(next(iter(laws.values())), study),
        ),
        *multipliers_of_models(study),
    ]
    first, last = laws.values()
    tables = [replace(_law_table(first, _MODELS), note=Markup()), _law_table(last, _MODELS)]
    return Section(f"Loss and compute per {study.input}", text, [*figures, *tables], commands)


def scaling_of_training(study: Study, commands: Sequence[str], floor: float | None = 0.0) -> Section | None:
    """The section on the error over the compute so far, if it was measured during training."""
    laws = laws_of_training(study, floor)
    if laws is None:
        return None
    text = Markup("<p>The {} of every model, whenever it was measured, by the compute of all training so far.</p>")
    caption = "Thin lines: single runs; thick lines: the frontier of each structure; dashed: power laws through it."
    name = in_words(laws.measure)
    figure = Figure("error-over-training-compute", Markup(caption), {name: [Panel("", _training(laws))]}, _runs(laws))
    parts: list[Figure | Table] = [figure, *multipliers_of_frontiers(laws), _law_table(laws, _HULL)]
    return Section("Error and compute of the training", text.format(name), parts, commands)


def _final_losses(laws: Laws) -> go.Figure:
    figure = go.Figure()
    shown: list[float] = []
    for i, law in enumerate(laws.laws):
        shown += _add_models(figure, i, law)
        _add_law(figure, i, law)
    style(figure)
    macs = [row.result.macs for law in laws.laws for row in law.rows]
    figure.update_xaxes(**log_axis(macs, laws.compute))
    figure.update_yaxes(**log_axis(shown, in_words(laws.measure)))
    return figure


def _add_models(figure: go.Figure, i: int, law: Law) -> list[float]:
    """Draw the means of one curve, and behind them the seeds where there are several; returns the losses drawn."""
    models = list(zip(law.rows, (own.losses[:, 0].tolist() for own in law.losses), strict=True))
    seeds = [
        (record, own) for row, losses in models if len(losses) > 1 for record, own in zip(row.good, losses, strict=True)
    ]
    template = "%{customdata}<br>%{x:,} MACs: %{y:.4g}<extra></extra>"
    if seeds:
        figure.add_scatter(
            x=[result(record).macs for record, _ in seeds],
            y=[own for _, own in seeds],
            customdata=[hover(record) for record, _ in seeds],
            mode="markers",
            marker={"color": colour(i), "symbol": f"{symbol(i)}-open", "size": 5},
            opacity=0.6,
            legendgroup=law.curve.name,
            showlegend=False,
            hovertemplate=template,
        )
    means = [fmean(losses) for _, losses in models]
    figure.add_scatter(
        x=[row.result.macs for row in law.rows],
        y=means,
        customdata=[hover_of_mean(row.good) for row in law.rows],
        mode="markers",
        marker={"color": colour(i), "symbol": symbol(i), "size": 9},
        name=law.curve.name,
        legendgroup=law.curve.name,
        hovertemplate=template,
    )
    return [*means, *(own for _, own in seeds)]


def _add_law(figure: go.Figure, i: int, law: Law, dash: str = "solid") -> None:
    if law.fit is None:
        return
    ends = (law.fit.frontier.compute[0], law.fit.frontier.compute[-1])
    steps = 2 if not law.fit.law.floor else 30
    macs = [ends[0] * (ends[1] / ends[0]) ** (k / (steps - 1)) for k in range(steps)]
    figure.add_scatter(
        x=macs,
        y=[law.fit.law(own) for own in macs],
        mode="lines",
        line={"color": colour(i), "width": 1.5, "dash": dash},
        legendgroup=law.curve.name,
        showlegend=False,
        hoverinfo="skip",
    )


def _training(laws: Laws) -> go.Figure:
    figure = go.Figure()
    compute: list[float] = []
    shown: list[float] = []
    for i, law in enumerate(laws.laws):
        for row, own in zip(law.rows, law.losses, strict=True):
            for record, losses in zip(row.good, own.losses.tolist(), strict=True):
                figure.add_scatter(
                    x=own.compute.tolist(),
                    y=losses,
                    mode="lines+markers" if len(losses) == 1 else "lines",
                    marker={"color": colour(i), "symbol": f"{symbol(i)}-open", "size": 5},
                    line={"color": colour(i), "width": 0.8},
                    opacity=0.5,
                    legendgroup=law.curve.name,
                    showlegend=False,
                    hovertemplate=f"{hover(record)}<br>%{{x:.4g}} MACs: %{{y:.4g}}<extra></extra>",
                )
                shown += losses
            compute += own.compute.tolist()
        _add_frontier(figure, i, law)
        _add_law(figure, i, law, "dash")
    style(figure)
    figure.update_xaxes(**log_axis(compute, laws.compute))
    figure.update_yaxes(**log_axis(shown, in_words(laws.measure)))
    return figure


def _add_frontier(figure: go.Figure, i: int, law: Law) -> None:
    if law.fit is None:
        return
    figure.add_scatter(
        x=law.fit.frontier.compute.tolist(),
        y=law.fit.frontier.loss.tolist(),
        customdata=[hover_of_mean(law.rows[k].good) for k in law.fit.curve.tolist()],
        mode="lines+markers",
        marker={"color": colour(i), "symbol": symbol(i), "size": 7},
        line={"color": colour(i), "width": 2.5},
        name=law.curve.name,
        legendgroup=law.curve.name,
        hovertemplate="%{customdata}<br>%{x:.4g} MACs: %{y:.4g}<extra></extra>",
    )


def _law_table(laws: Laws, frontier: str) -> Table:
    floor = laws.floor is None or laws.floor > 0
    headings = ["exponent", "95 % interval", "R²", "scale", *(["floor"] if floor else []), "models", "on the frontier"]
    rows = [
        [Cell(law.curve.name, law.curve.name, i), *(_law_row(law, floor) if law.fit else _no_law(law, len(headings)))]
        for i, law in enumerate(laws.laws)
    ]
    formula = _LAW.format(floor=Markup("floor + ") if floor else Markup())
    return Table((in_words(laws.measure), *headings, "× compute"), rows, Markup(frontier) + _NOTE.format(law=formula))


def _law_row(law: Law, floor: bool) -> list[Cell]:
    assert law.fit
    numbers, interval, points = law.fit.law, law.interval, len(law.fit.frontier.index)
    doubt = " (not identified)" if numbers.floor_identified is False else ""
    return [
        Cell(f"{numbers.exponent:.3f}", numbers.exponent),
        Cell(f"{interval.low:.3f} to {interval.high:.3f}, {interval.source}" if interval else "–"),
        Cell(f"{numbers.r_squared:.3f}", numbers.r_squared) if math.isfinite(numbers.r_squared) else Cell("–"),
        Cell(f"{numbers.scale:.3g}", numbers.scale),
        *([Cell(f"{numbers.floor:.3g}{doubt}", numbers.floor)] if floor else []),
        Cell(str(len(law.rows)), len(law.rows)),
        Cell(f"{points} points", points),
        Cell(with_interval(law.multiplier), law.multiplier.multiplier.value) if law.multiplier else Cell("–"),
    ]


def _no_law(law: Law, cells: int) -> list[Cell]:
    return [Cell("–"), Cell(law.why), *(cells - 1) * [Cell("–")]]


def _final_data(laws: Laws, study: Study) -> list[CsvRow]:
    return [
        csv_row(law.curve.name, record, **{measure: value(record, measure) for measure in (study.error, TRAIN_LOSS)})
        for law in laws.laws
        for row in law.rows
        for record in row.good
    ]


def _runs(laws: Laws) -> list[CsvRow]:
    return [
        csv_row(law.curve.name, record, training_macs=compute, **{laws.measure: loss})
        for law in laws.laws
        for row, own in zip(law.rows, law.losses, strict=True)
        for record, losses in zip(row.good, own.losses.tolist(), strict=True)
        for compute, loss in zip(own.compute.tolist(), losses, strict=True)
    ]
