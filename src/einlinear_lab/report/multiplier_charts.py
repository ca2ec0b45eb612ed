"""Charts of compute multipliers: how many times the compute dense needs for the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from markupsafe import Markup, escape

from einlinear_lab.analysis.comparison import Comparison, Curve, metric_title
from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, symbol, trace
from einlinear_lab.report.page import CsvRow, Figure
from einlinear_lab.report.points import group_row, hover
from einlinear_lab.scaling import Multiplier, MultiplierAt

# MACs, multiplier, ends of the error bar, hover label
_Point = tuple[float, Multiplier, tuple[float, float], str]


def figure_of_models(comparison: Comparison) -> list[Figure]:
    """Show the compute multiplier of every model against dense; no figure without any."""
    names, views = [curve.name for curve in comparison.curves], {}
    for metric in comparison.metrics:
        points = [_points_of_models(curve, metric) for curve in comparison.curves]
        if any(points):
            views[metric_title(metric)] = [_chart(names, points, f"MACs per {comparison.input}")]
    data: list[CsvRow] = []
    for group in (group for curve in comparison.curves for group in curve.best):
        for metric, over in group.multipliers.items():
            row = {"curve": group.curve, **group_row(group, lr=group.run.training.lr, metric=metric)}
            value, bound = (over.mean.value, over.mean.bound) if over.mean else ("", "")
            ends = {"smallest": over.smallest.value, "largest": over.largest.value, "seeds": over.seeds}
            data.append({**row, "multiplier": value, "bound": bound, **ends})
    caption = Markup(
        "Compute multiplier: how many times the MACs of a model dense needs for the same loss, with the same seeds. "
        "Higher is better; dense is 1. Bars: range over seeds. Open triangles are bounds, where the dense curve ends "
        "before the loss is reached: lower bounds point up, upper bounds down."
    )
    return [Figure("compute-multipliers", caption, views, data)] if views else []


def figure_along(curves: Sequence[tuple[str, Sequence[MultiplierAt]]], compute: str) -> list[Figure]:
    """Show the compute multipliers along the frontiers of named curves; no figure without any."""
    if not any(multipliers for _, multipliers in curves):
        return []
    points = [
        [(at.compute, at.multiplier, _ends(at), f"{escape(name)}<br>{at.compute:.3g} MACs: {at}") for at in multipliers]
        for name, multipliers in curves
    ]
    data: list[CsvRow] = []
    for name, multipliers in curves:
        for at in multipliers:
            low, high = (at.interval.low, at.interval.high) if at.interval else ("", "")
            point = {"curve": name, "training_macs": at.compute, "loss": at.loss, "multiplier": at.multiplier.value}
            data.append({**point, "bound": at.multiplier.bound, "low": low, "high": high})
    caption = Markup(
        "Compute multiplier along each frontier: how many times the compute dense needs for the same error. Bars: 95 % "
        "confidence intervals."
    )
    return [Figure("compute-multipliers", caption, {"": [_chart([name for name, _ in curves], points, compute)]}, data)]


def _points_of_models(curve: Curve, metric: str) -> list[_Point]:
    """Return the points of all models; none where all are 1, as those of dense."""
    models = [(group, over) for group in curve.best if (over := group.multipliers.get(metric)) and over.mean]
    if all(str(over) == "1.00×" for _, over in models):
        return []
    return [
        (group.result.macs, over.mean, (over.smallest.value, over.largest.value), f"{hover(*group.good)}<br>{over}")
        for group, over in models
        if over.mean
    ]


def _ends(at: MultiplierAt) -> tuple[float, float]:
    """Return the ends of an error bar; an end that the data does not set is not drawn."""
    value, interval = at.multiplier.value, at.interval
    if interval is None:
        return value, value
    return interval.low or value, interval.high if math.isfinite(interval.high) else value


def _chart(names: Sequence[str], points: Sequence[Sequence[_Point]], compute: str) -> Chart:
    traces = [part for i, name in enumerate(names) for part in _traces(i, name, points[i])]
    macs = [macs for series in points for macs, *_ in series]
    ends = [1.0, *(end for series in points for _, _, ends, _ in series for end in ends)]
    return Chart(traces, log_axis(macs, compute), log_axis(ends, "compute multiplier"), baseline=1)


def _traces(i: int, name: str, points: Sequence[_Point]) -> list[Trace]:
    """Draw a line through exact multipliers, and triangles for bounds."""
    triangles = {">": "triangle-up-open", "<": "triangle-down-open"}
    traces = list[Trace]()
    for is_exact in (True, False):
        series = [point for point in points if is_exact == (not point[1].bound)]
        if series:
            macs, multipliers, ends, labels = zip(*series, strict=True)
            draw = partial(trace, name=name, showlegend=not traces, marker_size=8)
            if is_exact:
                draw = partial(draw, symbol=symbol(i), line=1.5, ranges=ends)
            else:
                draw = partial(draw, symbol=[triangles[multiplier.bound] for multiplier in multipliers])
            values = [multiplier.value for multiplier in multipliers]
            traces.append(draw(macs, values, colour(i), "%{customdata}", labels))
    return traces
