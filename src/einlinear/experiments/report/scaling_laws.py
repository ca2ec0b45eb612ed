"""Losses over compute: every model, the frontier and the law of every structure, and compute multipliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear.experiments.findings.scaling import Interval, Multiplier, MultiplierAt
from einlinear.experiments.findings.scaling_laws import Law, Laws, laws_of_training, laws_per_input
from einlinear.experiments.findings.summary import TRAIN_LOSS, Study, in_words, result, value
from einlinear.experiments.report.page import (
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
from einlinear.experiments.report.plots import colour, log_axis, style, symbol

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
    """Final losses over the compute of an input, where a structure has models of two sizes or more."""
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
        *_multiplier_figures(study),
    ]
    first, last = laws.values()
    tables = [replace(_law_table(first, _MODELS), note=Markup()), _law_table(last, _MODELS)]
    return Section(f"Loss and compute per {study.input}", text, [*figures, *tables], commands)


def scaling_of_training(study: Study, commands: Sequence[str], floor: float | None = 0.0) -> Section | None:
    """The error during training over the compute so far, where it was measured during training."""
    laws = laws_of_training(study, floor)
    if laws is None:
        return None
    text = Markup("<p>The {} of every model, whenever it was measured, by the compute of all training so far.</p>")
    caption = "Thin lines: single runs; thick lines: the frontier of each structure; dashed: power laws through it."
    name = in_words(laws.measure)
    figures = [
        Figure("error-over-training-compute", Markup(caption), {name: [Panel("", _training(laws))]}, _runs(laws))
    ]
    if any(law.multipliers for law in laws.laws):
        plot = _along(laws)
        caption = "How many times the compute dense needs for the same error, along each frontier; bars: 95 %."
        figures.append(Figure("compute-multipliers", Markup(caption), {"": [Panel("", plot)]}, _along_data(laws)))
    return Section(
        "Error and compute of the training", text.format(name), [*figures, _law_table(laws, _HULL)], commands
    )


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
    """The means of one curve, and behind them the seeds where there are several; what was drawn."""
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


def _multiplier_figures(study: Study) -> list[Figure]:
    """The compute multiplier of every model against dense, for both measures."""
    views = {}
    for measure in study.measures:
        plot = _multipliers(study, measure)
        if plot is not None:
            views[in_words(measure)] = [Panel("", plot)]
    data = [
        {
            "curve": row.curve,
            "structure": row.run.model.structure,
            "width": row.run.model.width,
            "lr": row.run.training.lr,
            "macs": row.result.macs,
            "measure": measure,
            "multiplier": spread.mean.value if spread.mean else "",
            "bound": spread.mean.bound if spread.mean else "",
            "smallest": spread.smallest.value,
            "largest": spread.largest.value,
            "seeds": spread.seeds,
        }
        for curve in study.curves
        for row in curve.best
        for measure, spread in row.multipliers.items()
    ]
    caption = Markup(
        "Compute multiplier: how many times these MACs dense of the same seeds needs for the same loss. Up is better, "
        "dense is 1. Bars: the range over seeds. Open triangles are bounds, where the curve of dense ends before it "
        "says: lower bounds point up, upper ones down."
    )
    return [Figure("compute-multipliers", caption, views, data)] if views else []


def _multipliers(study: Study, measure: str) -> go.Figure | None:
    figure, shown = go.Figure(), [1.0]
    macs: list[float] = []
    for i, curve in enumerate(study.curves):
        models = [(row, own, own.mean) for row in curve.best if (own := row.multipliers.get(measure)) and own.mean]
        if all(str(spread) == "1.00×" for _, spread, _ in models):  # dense
            continue
        places = [
            _Place(
                row.result.macs,
                mean,
                (spread.smallest.value, spread.largest.value),
                f"{hover_of_mean(row.good)}<br>{spread}",
            )
            for row, spread, mean in models
        ]
        _add_multipliers(figure, i, curve.name, places)
        macs += [place.macs for place in places]
        shown += [end for place in places for end in place.ends]
    if not macs:
        return None
    _finish(figure, macs, shown, f"MACs per {study.input}")
    return figure


@dataclass(frozen=True)
class _Place:
    """A compute multiplier at some compute, the ends of its bar, and what the pointer shows."""

    macs: float
    multiplier: Multiplier
    ends: tuple[float, float]
    hover: str


def _add_multipliers(figure: go.Figure, i: int, name: str, places: Sequence[_Place]) -> None:
    """A line through those that are known, and triangles for the bounds."""
    exact = [place for place in places if not place.multiplier.bound]
    bounds = [place for place in places if place.multiplier.bound]
    common = {"legendgroup": name, "name": name, "hovertemplate": "%{customdata}<extra></extra>"}
    if exact:
        figure.add_scatter(
            x=[place.macs for place in exact],
            y=[place.multiplier.value for place in exact],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [place.ends[1] - place.multiplier.value for place in exact],
                "arrayminus": [place.multiplier.value - place.ends[0] for place in exact],
                "thickness": 1,
            },
            customdata=[place.hover for place in exact],
            mode="lines+markers",
            marker={"color": colour(i), "symbol": symbol(i), "size": 8},
            line={"color": colour(i), "width": 1.5},
            **common,
        )
    if bounds:
        symbols = {">": "triangle-up-open", "<": "triangle-down-open"}
        figure.add_scatter(
            x=[place.macs for place in bounds],
            y=[place.multiplier.value for place in bounds],
            customdata=[place.hover for place in bounds],
            mode="markers",
            marker={"color": colour(i), "symbol": [symbols[place.multiplier.bound] for place in bounds], "size": 8},
            showlegend=not exact,
            **common,
        )


def _finish(figure: go.Figure, macs: Sequence[float], shown: Sequence[float], title: str) -> None:
    style(figure)
    figure.add_hline(y=1, line={"color": colour(0), "width": 1, "dash": "dot"})
    figure.update_xaxes(**log_axis(macs, title))
    figure.update_yaxes(**log_axis(shown, "compute multiplier"))


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


def _along(laws: Laws) -> go.Figure:
    figure, shown = go.Figure(), [1.0]
    for i, law in enumerate(laws.laws):
        places = [
            _Place(
                own.compute,
                own.multiplier,
                _ends(own.interval, own.multiplier.value),
                f"{escape(law.curve.name)}<br>{own.compute:.3g} MACs: {_with_interval(own)}",
            )
            for own in law.multipliers
        ]
        _add_multipliers(figure, i, law.curve.name, places)
        shown += [end for place in places for end in place.ends]
    _finish(figure, [own.compute for law in laws.laws for own in law.multipliers], shown, laws.compute)
    return figure


def _ends(interval: Interval | None, value: float) -> tuple[float, float]:
    """Of a bar; an end that the data does not set is not drawn."""
    if interval is None:
        return value, value
    return interval.low or value, interval.high if math.isfinite(interval.high) else value


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
        Cell(_with_interval(law.multiplier), law.multiplier.multiplier.value) if law.multiplier else Cell("–"),
    ]


def _no_law(law: Law, cells: int) -> list[Cell]:
    return [Cell("–"), Cell(law.why), *(cells - 1) * [Cell("–")]]


def _with_interval(at: MultiplierAt) -> str:
    if at.multiplier.bound or at.interval is None:
        return str(at.multiplier)
    return f"{at.multiplier} ({at.interval.low:.2f} to {at.interval.high:.2f})"


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


def _along_data(laws: Laws) -> list[CsvRow]:
    return [
        {
            "curve": law.curve.name,
            "training_macs": own.compute,
            "loss": own.loss,
            "multiplier": own.multiplier.value,
            "bound": own.multiplier.bound,
            "low": own.interval.low if own.interval else "",
            "high": own.interval.high if own.interval else "",
        }
        for law in laws.laws
        for own in law.multipliers
    ]
