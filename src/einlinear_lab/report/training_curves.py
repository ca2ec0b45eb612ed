"""Metrics during training: the loss over steps and over time, and the load of experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from einlinear_lab.analysis.comparison import Comparison, logged
from einlinear_lab.report.charts import Chart, axis, colour, log_axis, trace
from einlinear_lab.report.page import CsvRow, Figure, Section
from einlinear_lab.report.points import hover, run_row
from einlinear_lab.runs.records import Record

_MAX_RUNS = 48
# points of a line
_MAX_POINTS = 200
# half the window of the running mean, as a share of the run
_HALF_WINDOW = 0.02
_LOOK = f"smoothed by a running mean over {2 * _HALF_WINDOW:.0%} of the steps; wider models have wider lines"
_EXPERT_METRICS = {"largest load": "moe_largest", "entropy": "moe_entropy"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """A smoothed metric of one run of a named curve; (points,), in seconds without data loading and evaluations."""

    curve: str
    record: Record
    steps: Array
    seconds: Array
    values: Array


def training_curves_of(comparison: Comparison, metric: str) -> list[TrainingCurve]:
    """Return curves of at most 48 runs that logged the metric twice: best learning rates first, first seeds first."""
    best = [group for curve in comparison.curves for group in curve.best]
    others = [group for group in comparison.groups if group not in best]
    runs = [
        (group.curve, record)
        for groups in (best, others)
        for seed in itertools.zip_longest(*([(group, record) for record in group.records] for group in groups))
        for group, record in filter(None, seed)
    ]
    lines = (line for curve, record in runs if (line := _training_curve(curve, record, metric)))
    return list(itertools.islice(lines, _MAX_RUNS))


def section(comparison: Comparison) -> Section | None:
    """Show training losses, if runs logged them at several steps."""
    curves = training_curves_of(comparison, "train_loss")
    if not curves:
        return None
    axes = {"by steps": "steps", "by time": "seconds"}
    views = {view: [_chart(curves, comparison, over, "training loss")] for view, over in axes.items()}
    count = "" if len(curves) == len(comparison.records) else f"{len(curves)} of {len(comparison.records)} runs. "
    caption = Markup("{}Loss of the training batches, {}. Seconds of training exclude data loading and evaluations.")
    figure = Figure("training-curves", caption.format(count, _LOOK), views, _rows(curves, "smoothed_train_loss"))
    return Section("Training curves", figures=[figure])


def section_of_experts(comparison: Comparison) -> Section | None:
    """Show the load of experts, if there are mixtures of experts."""
    curves = {name: training_curves_of(comparison, metric) for name, metric in _EXPERT_METRICS.items()}
    if not all(curves.values()):
        return None
    views = {name: [_chart(lines, comparison, "steps", name)] for name, lines in curves.items()}
    caption = Markup(
        "<b>Largest load</b>: tokens of the most used expert of all mixtures, relative to a uniform load. "
        "<b>Entropy</b>: entropy of the expert shares relative to a uniform load, mean over the mixtures: 1 is "
        "uniform, 0 routes all tokens to one expert. Both of one batch, {}."
    ).format(_LOOK)
    data = [row for name, lines in curves.items() for row in _rows(lines, f"smoothed_{_EXPERT_METRICS[name]}")]
    return Section("Expert load", figures=[Figure("expert-loads", caption, views, data)])


def _training_curve(curve: str, record: Record, metric: str) -> TrainingCurve | None:
    points = logged(record, metric)
    if len(points) < 2:
        return None
    steps, seconds, values = np.array(points, dtype=float).T
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int))
    return TrainingCurve(curve, record, steps[shown], seconds[shown], _smooth(steps, values)[shown])


def _smooth(steps: Array, values: Array) -> Array:
    """Return the running mean over a centred window, which is narrower towards the ends."""
    half = np.minimum(_HALF_WINDOW * steps[-1], np.minimum(steps - steps[0], steps[-1] - steps))
    first = np.searchsorted(steps, steps - half - 1e-9)
    last = np.searchsorted(steps, steps + half + 1e-9)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _chart(curves: Sequence[TrainingCurve], comparison: Comparison, over: str, title: str) -> Chart:
    names = [curve.name for curve in comparison.curves]
    widths = sorted({line.record.run.model.width for line in curves})
    firsts = {line.curve: line for line in reversed(curves)}
    traces = []
    for line in curves:
        i, rank = names.index(line.curve), widths.index(line.record.run.model.width) / max(1, len(widths) - 1)
        x, y, label = getattr(line, over), line.values, f"{hover(line.record)}<br>%{{x:.4g}} {over}: %{{y:.4g}}"
        draw = partial(trace, line=0.8 + 1.7 * rank, line_dash=_DASHES[i // 8 % len(_DASHES)], opacity=0.8)
        is_first = line is firsts[line.curve]
        traces.append(draw(x.tolist(), y.tolist(), colour(i), label, name=line.curve, showlegend=is_first))
    values = [value for line in curves for value in line.values.tolist()]
    return Chart(traces, axis(over, rangemode="tozero"), log_axis(values, title) if min(values) > 0 else axis(title))


def _rows(curves: Sequence[TrainingCurve], name: str) -> list[CsvRow]:
    return [
        run_row(line.curve, line.record, step=int(step), seconds=seconds, **{name: value})
        for line in curves
        for step, seconds, value in zip(line.steps.tolist(), line.seconds.tolist(), line.values.tolist(), strict=True)
    ]
