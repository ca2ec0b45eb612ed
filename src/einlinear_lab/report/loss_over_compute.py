"""Loss against compute: per input and during training, with the scaling laws of the frontiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from markupsafe import Markup

from einlinear_lab import scaling
from einlinear_lab.analysis.columns import Column
from einlinear_lab.analysis.comparison import Comparison, metric_title, result_of
from einlinear_lab.analysis.curve_fits import CurveFit, ScalingLaws, law_columns, laws_of_training, laws_per_input
from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, symbol, trace
from einlinear_lab.report.multiplier_charts import figure_along, figure_of_models
from einlinear_lab.report.page import Figure, Section, SortableTable
from einlinear_lab.report.points import hover, run_row
from einlinear_lab.runs.records import Record

_FRONTIER_OF_MODELS = (
    "<b>Frontier</b>: models that no cheaper model of the same structure beats, means over the seeds. "
)


_FRONTIER_OF_TRAINING = (
    "<b>Frontier</b>: points on the lower convex hull of log loss over log MACs, or at most 2 % above it, means over "
    "the seeds (arXiv 2410.02117). "
)


_NOTE = (
    "<b>Exponent</b>: of the least-squares power law through the frontier, loss = {floor}scale × "
    "MACs<sup>−exponent</sup>. <b>95 % interval</b>: confidence interval from resampled seeds where every model has "
    "several, otherwise from the regression, as if points were independent. <b>Points</b>: on the frontier. <b>Compute "
    "multiplier</b>: how many times the compute dense needs for the same loss, at the largest compute that the dense "
    "frontier covers."
)


def section_per_input(comparison: Comparison, floor: float | None = 0.0) -> Section | None:
    """Show final losses over the compute per input, if a structure has at least two model sizes."""
    if not any(len({group.result.macs for group in curve.best}) > 1 for curve in comparison.curves):
        return None
    laws, unit = [laws_per_input(comparison, metric, floor) for metric in comparison.metrics], comparison.input
    caption = Markup(
        "Lower left is better. Filled marks: means over the seeds; open marks: single seeds; lines: power laws through "
        "the frontier."
    )
    data = [
        run_row(fit.curve.name, record, **comparison.values(record))
        for fit in laws[0].curves
        for group in fit.groups
        for record in group.good
    ]
    views = {metric_title(law.metric): [_chart(law, _final_traces)] for law in laws}
    error, loss = (_table(law, _FRONTIER_OF_MODELS) for law in laws)
    rates = " at its best learning rate" if "lr" in comparison.varied else ""
    text = Markup("<p>Every model{}, over the compute of one {}.</p>").format(rates, unit)
    figures = [Figure(f"loss-over-macs-per-{unit}", caption, views, data), *figure_of_models(comparison)]
    return Section(f"Loss against compute per {unit}", text, figures, [replace(error, note=Markup()), loss])


def section_of_training(comparison: Comparison, floor: float | None = 0.0) -> Section | None:
    """Show the error over the training compute so far, if it was measured during training."""
    laws = laws_of_training(comparison, floor)
    if laws is None:
        return None
    name, multipliers = metric_title(laws.metric), [(fit.curve.name, fit.multipliers) for fit in laws.curves]
    text = Markup("<p>The {} of every model at every evaluation, over the MACs of all forward passes so far.</p>")
    caption = Markup("Thin lines: runs; thick lines: the frontier of each structure; dashed: power laws through it.")
    data = [
        run_row(fit.curve.name, record, training_macs=compute, **{laws.metric: loss})
        for fit in laws.curves
        for record, curve, losses in _seeds(fit)
        for compute, loss in zip(curve.compute.tolist(), losses, strict=True)
    ]
    views = {name: [_chart(laws, _training_traces)]}
    figures = [Figure("error-over-training-compute", caption, views, data), *figure_along(multipliers, laws.compute)]
    return Section("Error against training compute", text.format(name), figures, [_table(laws, _FRONTIER_OF_TRAINING)])


def _seeds(fit: CurveFit) -> list[tuple[Record, scaling.LossCurves, list[float]]]:
    return [
        (record, curve, losses)
        for group, curve in zip(fit.groups, fit.losses, strict=True)
        for record, losses in zip(group.good, curve.losses.tolist(), strict=True)
    ]


def _chart(laws: ScalingLaws, draw: Callable[[CurveFit, int], list[Trace]]) -> Chart:
    traces = [part for i, fit in enumerate(laws.curves) for part in draw(fit, i)]
    losses = [loss for fit in laws.curves for curve in fit.losses for loss in curve.losses.flat]
    compute = [compute for fit in laws.curves for curve in fit.losses for compute in curve.compute]
    return Chart(traces, log_axis(compute, laws.compute), log_axis(losses, metric_title(laws.metric)))


def _final_traces(fit: CurveFit, i: int) -> list[Trace]:
    draw = partial(trace, colour=colour(i), name=fit.curve.name, hover="%{customdata}<br>%{x:,} MACs: %{y:.4g}")
    seeds = [(result_of(r).macs, losses[0], hover(r)) for r, curve, losses in _seeds(fit) if len(curve.losses) > 1]
    traces = []
    if seeds:
        x, y, texts = zip(*seeds, strict=True)
        traces.append(draw(x, y, texts=texts, symbol=f"{symbol(i)}-open", marker_size=5, opacity=0.6))
    macs, means = [group.result.macs for group in fit.groups], [float(curve.losses.mean()) for curve in fit.losses]
    traces.append(
        draw(macs, means, texts=[hover(*group.good) for group in fit.groups], showlegend=True, symbol=symbol(i))
    )
    return [*traces, *_law(fit, i, "solid")]


def _training_traces(fit: CurveFit, i: int) -> list[Trace]:
    draw, label, traces = partial(trace, colour=colour(i), name=fit.curve.name), "<br>%{x:.4g} MACs: %{y:.4g}", []
    for record, curve, losses in _seeds(fit):
        look = partial(
            draw, symbol=f"{symbol(i)}-open" if len(losses) == 1 else "", marker_size=5, line=0.8, opacity=0.5
        )
        traces.append(look(curve.compute.tolist(), losses, hover=f"{hover(record)}{label}"))
    if fit.fit:
        frontier, texts = fit.fit.frontier, [hover(*fit.groups[k].good) for k in fit.fit.curve.tolist()]
        look = partial(draw, showlegend=True, symbol=symbol(i), marker_size=7, line=2.5)
        x, y = frontier.compute.tolist(), frontier.loss.tolist()
        traces.append(look(x, y, hover=f"%{{customdata}}{label}", texts=texts))
    return [*traces, *_law(fit, i, "dash")]


def _law(fit: CurveFit, i: int, dash: str) -> list[Trace]:
    """Draw the law of a curve over its frontier, if there is one; it is straight without a floor."""
    if fit.fit is None:
        return []
    x = np.geomspace(fit.fit.frontier.compute[0], fit.fit.frontier.compute[-1], 30 if fit.fit.law.floor else 2)
    return [trace(x.tolist(), fit.fit.law(x).tolist(), colour(i), name=fit.curve.name, line=1.5, line_dash=dash)]


def _table(laws: ScalingLaws, frontier: str) -> SortableTable:
    names = Column.of(metric_title(laws.metric), [fit.curve.name for fit in laws.curves])
    columns = [names, *law_columns(laws)]
    # a curve without a law has the reason in place of its interval
    reasons = [fit.reason for fit in laws.curves]
    for i, column in enumerate(columns):
        if column.heading == "95 % interval":
            texts = [reason or text for reason, text in zip(reasons, column.texts, strict=True)]
            columns[i] = replace(column, texts=texts)
    has_floor = any(column.heading == "floor" for column in columns)
    note = Markup(frontier) + Markup(_NOTE).format(floor="floor + " if has_floor else "")
    return SortableTable.of(columns, note, curves=range(len(laws.curves)))
