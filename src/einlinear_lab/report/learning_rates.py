"""Learning-rate sweeps: the loss over the learning rate for every model size, and the optimal learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from markupsafe import Markup, escape

from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, shade, symbol, trace, width_axis
from einlinear_lab.report.comparison import Comparison, Curve, SeedGroup, metric_of, metric_title, result_of
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable, hover, run_row
from einlinear_lab.scaling.multipliers import Bound, Multiplier

# learning rates of a sweep
MIN_RATES = 3

# (learning rate, loss); None where the run diverged
Point = tuple[float, float | None]
CurveSweeps = Sequence[tuple[Curve, Sequence["LearningRateSweep"]]]


@dataclass(frozen=True)
class Optimum:
    """The optimum of the mean loss over the seeds, and the range of those of single seeds, which need not contain it.

    The bound is "<" or ">" where the lowest loss is at the smallest or at the largest learning rate of the sweep.
    """

    lr: float
    smallest: float
    largest: float
    bound: Bound


@dataclass(frozen=True)
class LearningRateSweep:
    """One model size ("width 64" with every other size that varies) at several learning rates."""

    size: str
    width: int
    groups: tuple[SeedGroup, ...]
    # None where every run diverged
    optimum: Optimum | None


def sweeps_of(comparison: Comparison, curve: Curve, metric: str) -> list[LearningRateSweep]:
    """Return the sweeps of a curve by model size, of all sizes with at least three learning rates."""
    sizes: dict[str, list[SeedGroup]] = {}
    for group in curve.groups:
        sizes.setdefault(comparison.size(group.run), []).append(group)
    return [
        LearningRateSweep(size, groups[0].run.model.width, tuple(groups), _optimum(groups, metric))
        for size, groups in sizes.items()
        if len(groups) >= MIN_RATES
    ]


def optimum_shift(sweeps: Sequence[LearningRateSweep]) -> Multiplier | None:
    """Return the largest optimum over the smallest: a lower bound where an optimum is at an end of its sweep.

    None with fewer than two optima, or where the largest may be smaller, or the smallest larger, than its sweep shows.
    """
    optima = sorted((sweep.optimum for sweep in sweeps if sweep.optimum), key=lambda optimum: optimum.lr)
    if len(optima) < 2 or optima[0].bound == ">" or optima[-1].bound == "<":
        return None
    return Multiplier(optima[-1].lr / optima[0].lr, ">" if any(optimum.bound for optimum in optima) else "")


def common_lr(sweeps: Sequence[LearningRateSweep], metric: str) -> tuple[float, float] | None:
    """Return the learning rate that serves all sizes best, of those that all have, and what it costs.

    That is the largest relative excess of the mean over the lowest of its size. None with fewer than two sizes, or
    where every learning rate diverges at some size.
    """
    means = [
        {group.run.training.lr: mean for group in sweep.groups if not group.diverged and (mean := group.mean(metric))}
        for sweep in sweeps
    ]
    shared = set.intersection(*map(set, means)) if len(means) > 1 else set()
    excesses = {lr: max(of_size[lr] / min(of_size.values()) - 1 for of_size in means) for lr in shared}
    return min(excesses.items(), key=lambda item: item[1]) if excesses else None


def best_lr(points: Sequence[Point]) -> tuple[float, Bound] | None:
    """Return the learning rate of the lowest loss, with a bound at an end of the sweep; None if all runs diverged.

    It is the vertex of the parabola through the lowest point and its two neighbours, over the log learning rate; or the
    lowest point itself, at an end or next to a learning rate that diverges.
    """
    points = sorted(points)
    losses = [math.inf if loss is None else loss for _, loss in points]
    i = int(np.argmin(losses))
    if not points or losses[i] == math.inf:
        return None
    if i in (0, len(points) - 1):
        return points[i][0], "<" if i == 0 else ">"
    around = slice(i - 1, i + 2)
    if math.inf in losses[around]:
        return points[i][0], ""
    x = np.log([lr for lr, _ in points[around]])
    curvature, slope, _ = np.polyfit(x - x[1], losses[around], 2)
    return (float(np.exp(x[1] - slope / (2 * curvature))) if curvature > 0 else points[i][0]), ""


def section(comparison: Comparison) -> Section | None:
    """Show the sweeps, if any model size has at least three learning rates."""
    by_metric = {
        metric: [(curve, of_curve) for curve in comparison.curves if (of_curve := sweeps_of(comparison, curve, metric))]
        for metric in comparison.metrics
    }
    if not any(by_metric.values()):
        return None
    titled = {metric_title(metric): (metric, curves) for metric, curves in by_metric.items()}
    views = {title: _sweep_charts(curves, metric) for title, (metric, curves) in titled.items()}
    caption = Markup(
        "One line per model size, means over the seeds; open marks: single seeds. Large ring: the optimum, by a "
        "parabola through the lowest point and its neighbours. Crosses at the top: diverged. <i>Naive</i>: all "
        "factors have the learning rate of a dense layer. All panels share their axes."
    )
    data = [
        run_row(curve.name, record, diverged=result_of(record).diverged, **comparison.values(record))
        for curve, sweeps in by_metric[comparison.error]
        for sweep in sweeps
        for group in sweep.groups
        for record in group.records
    ]
    figure = Figure("learning-rates", caption, views, data)
    caption = Markup(
        "The optimal learning rate by width. A horizontal line means that the learning rate transfers across "
        "widths. Bars: range over single seeds. Open marks: the optimum is at an end of the sweep, or beyond."
    )
    optima = [
        {"curve": curve.name, "structure": curve.structure, "size": sweep.size, "width": sweep.width, "metric": metric}
        | {"best_lr" if name == "lr" else name: value for name, value in vars(sweep.optimum).items()}
        for metric, curves in by_metric.items()
        for curve, sweeps in curves
        for sweep in sweeps
        if sweep.optimum
    ]
    charts = {title: [_optima_chart(curves)] for title, (_, curves) in titled.items()}
    tables = [_table(curves, metric) for metric, curves in titled.values()]
    return Section(
        "Learning rates", figures=[figure, Figure("best-learning-rates", caption, charts, optima)], tables=tables
    )


def _optimum(groups: Sequence[SeedGroup], metric: str) -> Optimum | None:
    """Return the optimum of the means and the range over seeds; a learning rate where a seed diverges has no loss."""
    best = best_lr([(group.run.training.lr, None if group.diverged else group.mean(metric)) for group in groups])
    if best is None:
        return None
    seeds: dict[int, list[Point]] = {}
    for record in (record for group in groups for record in group.records):
        seeds.setdefault(record.run.seed, []).append((record.run.training.lr, metric_of(record, metric)))
    optima = [single[0] for points in seeds.values() if len(points) == len(groups) and (single := best_lr(points))]
    lr, bound = best
    return Optimum(lr, min(optima, default=lr), max(optima, default=lr), bound)


def _sizes(curves: CurveSweeps) -> list[str]:
    sizes = {sweep.size: sweep.width for _, sweeps in curves for sweep in sweeps}
    return sorted(sizes, key=lambda size: sizes[size])


def _sweep_charts(curves: CurveSweeps, metric: str) -> list[Chart]:
    groups = [group for _, sweeps in curves for sweep in sweeps for group in sweep.groups]
    losses = [loss for group in groups for loss in group.values(metric) if loss > 0]
    sizes, top = _sizes(curves), 1.08 * max(losses, default=1.0)
    x = log_axis([group.run.training.lr for group in groups], "learning rate")
    y = log_axis([*losses, top], metric_title(metric))
    charts = []
    for curve, sweeps in curves:
        traces = [part for sweep in sweeps for part in _traces(sweep, metric, sizes, top)]
        charts.append(Chart(traces, x, y, title=curve.name, height=340))
    return charts


def _traces(sweep: LearningRateSweep, metric: str, sizes: Sequence[str], top: float) -> list[Trace]:
    """Draw one size: its seeds, their means, the diverged runs and the optimum."""
    i = sizes.index(sweep.size)
    draw = partial(trace, colour=shade(i, len(sizes)), name=sweep.size)
    good = [group for group in sweep.groups if group.good]
    seeds = [record for group in good if len(group.good) > 1 for record in group.good]
    diverged = [record for group in sweep.groups for record in group.records if result_of(record).diverged]
    traces, label = [], "%{customdata}<br>%{y:.4g}"
    if seeds:
        lrs, losses = [record.run.training.lr for record in seeds], [metric_of(record, metric) for record in seeds]
        texts = list(map(hover, seeds))
        traces.append(
            draw(lrs, losses, hover=label, texts=texts, symbol=f"{symbol(i)}-open", marker_size=4, opacity=0.6)
        )
    lrs, losses = [group.run.training.lr for group in good], [group.mean(metric) for group in good]
    texts = [hover(*group.good) for group in good]
    traces.append(
        draw(lrs, losses, hover=label, texts=texts, showlegend=True, symbol=symbol(i), marker_size=7, line=1.5)
    )
    if diverged:
        lrs, height = [record.run.training.lr for record in diverged], [top] * len(diverged)
        texts = [f"{hover(record)}<br>diverged" for record in diverged]
        traces.append(draw(lrs, height, hover="%{customdata}", texts=texts, symbol="x-thin-open", marker_line_width=2))
    if sweep.optimum:
        lr = sweep.optimum.lr
        nearest = min(good, key=lambda group: abs(math.log(group.run.training.lr / lr)))
        label = f"{sweep.size}: optimum {lr:.3g}"
        traces.append(
            draw([lr], [nearest.mean(metric)], hover=label, symbol="circle-open", marker_size=15, marker_line_width=2)
        )
    return traces


def _optima_chart(curves: CurveSweeps) -> Chart:
    traces, ends = [], list[float]()
    for i, (curve, sweeps) in enumerate(curves):
        optima = [(sweep, sweep.optimum) for sweep in sweeps if sweep.optimum]
        ends += [end for _, best in optima for end in (best.smallest, best.lr, best.largest)]
        widths, lrs = [sweep.width for sweep, _ in optima], [best.lr for _, best in optima]
        texts, label = [sweep.size for sweep, _ in optima], "%{customdata}<br>optimum %{y:.3g}"
        marks = [f"{symbol(i)}-open" if best.bound else symbol(i) for _, best in optima]
        ranges = [(best.smallest, best.largest) for _, best in optima]
        draw = partial(trace, name=curve.name, showlegend=True, symbol=marks, line=1.5, ranges=ranges)
        dash = "solid" if curve.structure_aware else "dot"
        traces.append(draw(widths, lrs, colour(i), f"{escape(curve.name)}, {label}", texts, line_dash=dash))
    all_widths = {sweep.width for _, sweeps in curves for sweep in sweeps if sweep.optimum}
    return Chart(traces, width_axis(all_widths), log_axis(ends, "optimal learning rate"))


def _table(curves: CurveSweeps, metric: str) -> SortableTable:
    title = metric_title(metric)
    sizes, rows = _sizes(curves), []
    for i, (curve, sweeps) in enumerate(curves):
        shift, optima = optimum_shift(sweeps), {sweep.size: sweep.optimum for sweep in sweeps}
        ratio = Cell(shift.text.replace(">", "≥"), shift.value) if shift else Cell("–")
        common = common_lr(sweeps, metric)
        one = Cell(f"{common[0]:.2g}, up to {common[1]:.1%} above", common[1]) if common else Cell("–")
        cells = [_cell(optima[size]) if size in optima else Cell("") for size in sizes]
        rows.append([Cell(curve.name, curve.name, i), ratio, one, *cells])
    note = Markup(
        "Optimal learning rate by {}, with the range over single seeds in brackets. ≤ and ≥: at an end of the sweep. "
        "<b>Largest / smallest</b>: 1 where one learning rate is optimal at every size; ≥ and – where an optimum at an "
        "end of its sweep leaves the ratio open. <b>One for all</b>: the learning rate that serves all sizes best, "
        "and how far the result with it is above the best of a size."
    )
    columns = (f"optimum by {title}", "largest / smallest", "one for all", *sizes)
    return SortableTable(columns, rows, note.format(title))


def _cell(best: Optimum | None) -> Cell:
    if best is None:
        return Cell("diverged")
    sign = {"": "", "<": "≤ ", ">": "≥ "}[best.bound]
    ends = "" if best.smallest == best.largest else f" ({best.smallest:.2g} to {best.largest:.2g})"
    return Cell(f"{sign}{best.lr:.2g}{ends}", best.lr)
