"""Learning rates: the loss over the learning rate for every size, and the optimal learning rate over the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from markupsafe import Markup, escape

from einlinear_lab.analysis.comparison import Comparison, Curve, metric_of, metric_title, result_of
from einlinear_lab.analysis.learning_rates import (
    LearningRateSweep,
    Optimum,
    along,
    common_lr,
    optimum_shift,
    sweeps_of,
    swept_curves,
    varied_size,
)
from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, shade, size_axis, symbol, trace
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable
from einlinear_lab.report.points import hover, run_row

CurveSweeps = Sequence[tuple[Curve, Sequence[LearningRateSweep]]]


def section(comparison: Comparison) -> Section | None:
    """Show the sweeps, if any size has at least three learning rates."""
    by_metric = {
        metric: [
            (curve, sweeps) for curve in swept_curves(comparison) if (sweeps := sweeps_of(comparison, curve, metric))
        ]
        for metric in comparison.metrics
    }
    if not any(by_metric.values()):
        return None
    titled = {metric_title(metric): (metric, curves) for metric, curves in by_metric.items()}
    views = {title: _sweep_charts(curves, metric) for title, (metric, curves) in titled.items()}
    caption = Markup(
        "One line per size, means over the seeds; open marks: single seeds. Large ring: the optimum, by a "
        "parabola through the lowest point and its neighbours. Crosses at the top: diverged. <i>Naive</i>: all "
        "factors have the learning rate of a dense layer. All panels share their axes."
    )
    data = [
        run_row(curve.name, record, diverged=result_of(record).diverged, **comparison.values(record))
        for curve, sweeps in by_metric[comparison.metric]
        for sweep in sweeps
        for group in sweep.groups
        for record in group.records
    ]
    figure = Figure("learning-rates", caption, views, data)
    size = varied_size([sweep for _, sweeps in by_metric[comparison.metric] for sweep in sweeps])
    caption = Markup(
        "The optimal learning rate by {}. A horizontal line means that the learning rate transfers. Bars: range over "
        "single seeds. Open marks: the optimum is at an end of the sweep, or beyond."
    ).format(size.replace("_", " "))
    optima = [
        {"curve": curve.name, "structure": curve.structure, "size": sweep.name, **sweep.size, "metric": metric}
        | {"best_lr" if name == "lr" else name: value for name, value in vars(sweep.optimum).items()}
        for metric, curves in by_metric.items()
        for curve, sweeps in curves
        for sweep in sweeps
        if sweep.optimum
    ]
    charts = {title: [_optima_chart(curves, size)] for title, (_, curves) in titled.items()}
    tables = [_table(curves, metric) for metric, curves in titled.values()]
    return Section(
        "Learning rates", figures=[figure, Figure("best-learning-rates", caption, charts, optima)], tables=tables
    )


def _sizes(curves: CurveSweeps) -> list[str]:
    sizes = {sweep.name: tuple(sweep.size.values()) for _, sweeps in curves for sweep in sweeps}
    return sorted(sizes, key=lambda name: sizes[name])


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
    i = sizes.index(sweep.name)
    draw = partial(trace, colour=shade(i, len(sizes)), name=sweep.name)
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
        label = f"{sweep.name}: optimum {lr:.3g}"
        traces.append(
            draw([lr], [nearest.mean(metric)], hover=label, symbol="circle-open", marker_size=15, marker_line_width=2)
        )
    return traces


def _optima_chart(curves: CurveSweeps, size: str) -> Chart:
    traces, ends, sizes = [], list[float](), set[int]()
    for i, (curve, sweeps) in enumerate(curves):
        for k, line in enumerate(along(size, [sweep for sweep in sweeps if sweep.optimum])):
            optima = [(sweep, sweep.optimum) for sweep in line if sweep.optimum]
            ends += [end for _, best in optima for end in (best.smallest, best.lr, best.largest)]
            x, lrs = [sweep.size[size] for sweep, _ in optima], [best.lr for _, best in optima]
            sizes.update(x)
            texts, label = [sweep.name for sweep, _ in optima], "%{customdata}<br>optimum %{y:.3g}"
            marks = [f"{symbol(i)}-open" if best.bound else symbol(i) for _, best in optima]
            ranges = [(best.smallest, best.largest) for _, best in optima]
            draw = partial(trace, name=curve.name, showlegend=k == 0, symbol=marks, line=1.5, ranges=ranges)
            dash = "solid" if curve.structure_aware else "dot"
            traces.append(draw(x, lrs, colour(i), f"{escape(curve.name)}, {label}", texts, line_dash=dash))
    return Chart(traces, size_axis(size, sizes), log_axis(ends, "optimal learning rate"))


def _table(curves: CurveSweeps, metric: str) -> SortableTable:
    title = metric_title(metric)
    sizes, rows = _sizes(curves), []
    for i, (curve, sweeps) in enumerate(curves):
        shift, optima = optimum_shift(sweeps), {sweep.name: sweep.optimum for sweep in sweeps}
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
