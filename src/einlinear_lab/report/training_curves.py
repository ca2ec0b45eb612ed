"""Metrics during training: the loss over steps and over time, the time to a target loss, and the load of experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from einlinear_lab.models.config import DENSE
from einlinear_lab.report.charts import Chart, axis, colour, log_axis, trace
from einlinear_lab.report.comparison import Comparison, Curve, SeedGroup, logged, metric_title, result_of
from einlinear_lab.report.page import Cell, CsvRow, Figure, Section, SortableTable, hover, run_row
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
# (seconds of training, loss)
Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """A smoothed metric of one run of a named curve; (points,), in seconds without data loading and evaluations."""

    curve: str
    record: Record
    steps: Array
    seconds: Array
    values: Array


@dataclass(frozen=True)
class TimeToLoss:
    """The fastest model of a curve to a target loss, and its mean time without data loading and evaluations."""

    group: SeedGroup
    seconds: float

    @property
    def inputs_per_second(self) -> float | None:
        """The training throughput in images, tokens or vectors per second."""
        seconds = self.group.step_seconds
        return self.group.result.inputs / seconds if seconds else None


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


def section_of_time(comparison: Comparison) -> Section | None:
    """Show training times, if runs were evaluated during training and two curves reach a common loss."""
    targets = target_losses(comparison)
    if not targets:
        return None
    metric, error = comparison.error, metric_title(comparison.error)
    times = {curve.name: [fastest(curve, metric, target) for target in targets] for curve in comparison.curves}
    dense = next((times[curve.name] for curve in comparison.curves if curve.structure == DENSE), [None] * len(targets))
    headings = ["structure", *(f"{error} {target:.4g}" for target in targets), f"{comparison.input}s per second"]
    rows = []
    for i, (name, to_targets) in enumerate(times.items()):
        last = next((time for time in reversed(to_targets) if time), None)
        throughput = Cell.of((last.inputs_per_second or None) if last else None, ",.0f")
        rows.append([Cell(name, name, i), *map(_time_cell, to_targets, dense), throughput])
    note = Markup(
        "Seconds of training, without data loading and evaluations, of the fastest model of a structure; in brackets "
        "its width and the speed-up over dense. Last column: throughput of the model that reaches the lowest of these "
        "losses. Runs that shared a machine slowed each other down equally: compare times within a page only."
    )
    return Section("Training time to a target loss", tables=[SortableTable(headings, rows, note)])


def target_losses(comparison: Comparison, count: int = 5) -> list[float]:
    """Return target losses, even in log: from an early loss of all evaluated curves to the lowest that two reach."""
    lowest, early = [], []
    for curve in comparison.curves:
        runs = [_losses_over_time(record, comparison.error) for group in curve.best for record in group.good]
        runs = [points for points in runs if len(points) > 1]
        if runs:
            lowest.append(min(loss for points in runs for _, loss in points))
            early.append(min(points[0][1] for points in runs))
    if len(lowest) < 2 or not 0 < sorted(lowest)[1] < min(early):
        return []
    return [float(loss) for loss in np.geomspace(min(early), sorted(lowest)[1] * 1.001, count)]


def fastest(curve: Curve, metric: str, target: float) -> TimeToLoss | None:
    """Return the fastest model of a curve to a target; None where no model reaches it with all seeds."""
    candidates = []
    for group in curve.best:
        times = [seconds_to(_losses_over_time(record, metric), target) for record in group.good]
        reached = [seconds for seconds in times if seconds is not None]
        if reached and len(reached) == len(group.records):
            candidates.append(TimeToLoss(group, fmean(reached)))
    return min(candidates, key=lambda time: time.seconds, default=None)


def seconds_to(points: Sequence[Point], target: float) -> float | None:
    """Return the time at which a run first reaches a loss, interpolated between evaluations; None if it never does.

    >>> seconds_to([(10.0, 3.0), (20.0, 2.0), (30.0, 1.5)], 2.5)
    15.0
    """
    for (before, high), (seconds, loss) in zip([*points[:1], *points], points, strict=False):
        if loss <= target:
            return before + (high - target) / (high - loss) * (seconds - before) if high > loss else seconds
    return None


def _losses_over_time(record: Record, metric: str) -> list[Point]:
    return [] if result_of(record).diverged else [(seconds, loss) for _, seconds, loss in logged(record, metric)]


def _time_cell(time: TimeToLoss | None, dense: TimeToLoss | None) -> Cell:
    if time is None:
        return Cell("–")
    speed_up = f", {dense.seconds / time.seconds:.2f}×" if dense else ""
    return Cell(f"{time.seconds:.3g} s (width {time.group.run.model.width}{speed_up})", time.seconds)


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
