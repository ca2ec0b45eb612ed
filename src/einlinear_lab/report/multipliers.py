"""Compute multipliers: how many times the compute dense needs for the same loss, by model and along frontiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup, escape

from einlinear_lab.findings.scaling_laws import Laws
from einlinear_lab.findings.summary import Study, in_words
from einlinear_lab.report.page import CsvRow, Figure, Panel, hover_of_mean
from einlinear_lab.report.plots import colour, log_axis, style, symbol
from einlinear_lab.scaling import Interval, Multiplier, MultiplierAt


def multipliers_of_models(study: Study) -> list[Figure]:
    """The compute multiplier of every model against dense, for both measures; no figure where there is none."""
    views = {}
    for measure in study.measures:
        plot = _of_models(study, measure)
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


def multipliers_of_frontiers(laws: Laws) -> list[Figure]:
    """The compute multipliers along the frontiers of training curves; no figure where there are none."""
    if not any(law.multipliers for law in laws.laws):
        return []
    caption = Markup("How many times the compute dense needs for the same error, along each frontier; bars: 95 %.")
    return [Figure("compute-multipliers", caption, {"": [Panel("", _of_frontiers(laws))]}, _data(laws))]


def with_interval(at: MultiplierAt) -> str:
    """The multiplier, and in brackets its interval where it is no bound."""
    if at.multiplier.bound or at.interval is None:
        return str(at.multiplier)
    return f"{at.multiplier} ({at.interval.low:.2f} to {at.interval.high:.2f})"


@dataclass(frozen=True)
class _Place:
    """A compute multiplier at some compute, the ends of its bar, and what the pointer shows."""

    macs: float
    multiplier: Multiplier
    ends: tuple[float, float]
    hover: str


def _of_models(study: Study, measure: str) -> go.Figure | None:
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


def _of_frontiers(laws: Laws) -> go.Figure:
    figure, shown = go.Figure(), [1.0]
    for i, law in enumerate(laws.laws):
        places = [
            _Place(
                own.compute,
                own.multiplier,
                _ends(own.interval, own.multiplier.value),
                f"{escape(law.curve.name)}<br>{own.compute:.3g} MACs: {with_interval(own)}",
            )
            for own in law.multipliers
        ]
        _add_multipliers(figure, i, law.curve.name, places)
        shown += [end for place in places for end in place.ends]
    _finish(figure, [own.compute for law in laws.laws for own in law.multipliers], shown, laws.compute)
    return figure


def _ends(interval: Interval | None, value: float) -> tuple[float, float]:
    """The ends of a bar; one that the data does not set is not drawn."""
    if interval is None:
        return value, value
    return interval.low or value, interval.high if math.isfinite(interval.high) else value


def _add_multipliers(figure: go.Figure, i: int, name: str, places: Sequence[_Place]) -> None:
    """Draw a line through those that are known, and triangles for the bounds."""
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


def _data(laws: Laws) -> list[CsvRow]:
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
