"""Loss against seconds of training, and multipliers over time and compute at equal losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from markupsafe import Markup, escape

from einlinear_lab.analysis.comparison import Comparison, metric_title
from einlinear_lab.analysis.time_to_loss import (
    TimeFrontier,
    frontiers_of,
    multiplier_at,
    multipliers_over,
    target_losses,
    with_dense,
)
from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, symbol, trace
from einlinear_lab.report.page import Cell, CsvRow, Figure, Section, SortableTable
from einlinear_lab.report.points import hover, run_row


def section(comparison: Comparison) -> Section | None:
    """Show losses over training time, if runs were evaluated during training and two curves reach a common loss."""
    frontiers = frontiers_of(comparison)
    targets = target_losses(frontiers)
    if not targets:
        return None
    text = Markup(
        "<p>Seconds of training, without data loading, evaluations and compilation. Runs of <code>einlinear compare "
        "--interleave</code> take turns; runs that trained side by side slowed each other down.</p>"
    )
    figures = [_curves(comparison, frontiers), *_multipliers(comparison, frontiers)]
    return Section("Loss against seconds", text, figures, [_table(comparison, frontiers, targets)])


def _curves(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> Figure:
    metric = comparison.metric
    runs = [
        (frontier.curve, record, run)
        for frontier in frontiers
        for model in frontier.models
        for record, run in model.runs
    ]
    data = [
        run_row(curve.name, record, seconds=e.seconds, training_macs=e.macs, **{metric: e.loss})
        for curve, record, run in runs
        for e in run
    ]
    caption = Markup(
        "Lower left is better. Thin lines: runs; thick lines: the frontier of each structure, the least time in which "
        "one of its models reaches a loss with all seeds."
    )
    title = metric_title(metric)
    traces = [part for frontier in frontiers for part in _curve_traces(comparison, frontier)]
    seconds, losses = zip(*((e.seconds, e.loss) for *_, run in runs for e in run), strict=True)
    chart = Chart(traces, log_axis(seconds, "seconds of training"), log_axis(losses, title))
    return Figure("loss-over-seconds", caption, {title: [chart]}, data)


def _curve_traces(comparison: Comparison, frontier: TimeFrontier) -> list[Trace]:
    i, name = comparison.curves.index(frontier.curve), frontier.curve.name
    draw, label, traces = partial(trace, colour=colour(i), name=name), "<br>%{x:.4g} s: %{y:.4g}", []
    for model in frontier.models:
        for record, run in model.runs:
            seconds, _, losses = zip(*run, strict=True)
            traces.append(draw(seconds, losses, hover=f"{hover(record)}{label}", line=0.8, opacity=0.5))
    points = frontier.points()
    texts = [hover(*group.good) for *_, group in points]
    look = partial(draw, hover=f"%{{customdata}}{label}", texts=texts, line=2.5, showlegend=True)
    traces.append(look([seconds for seconds, *_ in points], [loss for _, loss, _ in points]))
    return traces


def _multipliers(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> list[Figure]:
    """Show the multipliers over time and compute of every structure against dense; no figure without any."""
    over = {
        frontier.curve.name: multipliers_over(frontier, dense) for frontier, dense in with_dense(comparison, frontiers)
    }
    over = {name: multipliers for name, multipliers in over.items() if multipliers}
    if not over:
        return []
    names = [curve.name for curve in comparison.curves]
    traces = list[Trace]()
    for name, multipliers in over.items():
        i, losses = names.index(name), [at.loss for at in multipliers]
        draw = partial(trace, losses, colour=colour(i), name=name, line=1.5)
        label = f"{escape(name)}<br>loss %{{x:.4g}}: %{{y:.2f}}× "
        traces.append(draw([at.time for at in multipliers], hover=f"{label}time", symbol=symbol(i), showlegend=True))
        traces.append(draw([at.compute for at in multipliers], hover=f"{label}compute", line_dash="dash"))
    data: list[CsvRow] = [
        {"curve": name, "loss": at.loss, "time_multiplier": at.time, "compute_multiplier": at.compute}
        for name, multipliers in over.items()
        for at in multipliers
    ]
    caption = Markup(
        "How many times longer the dense frontier needs for the same loss (solid), and how many times the MACs of "
        "training (dashed), where both frontiers were measured. Higher is better; dense is 1."
    )
    ends = [1.0, *(value for multipliers in over.values() for at in multipliers for value in (at.time, at.compute))]
    losses = [at.loss for multipliers in over.values() for at in multipliers]
    chart = Chart(traces, log_axis(losses, metric_title(comparison.metric)), log_axis(ends, "multiplier"), baseline=1)
    return [Figure("time-multipliers", caption, {"": [chart]}, data)]


def _table(comparison: Comparison, frontiers: Sequence[TimeFrontier], targets: Sequence[float]) -> SortableTable:
    names = [curve.name for curve in comparison.curves]
    dense = {frontier.curve.name: reference for frontier, reference in with_dense(comparison, frontiers)}
    headings = ["structure", metric_title(comparison.metric), "seconds", "width", "time multiplier"]
    headings += ["compute multiplier", f"{comparison.input}s per second"]
    rows = []
    for frontier in frontiers:
        name, reference = frontier.curve.name, dense.get(frontier.curve.name)
        for target in targets:
            if found := frontier.to(target):
                seconds, group = found
                over = multiplier_at(frontier, reference, target) if reference else None
                multipliers = [over.time, over.compute] if over else [None, None]
                numbers = [Cell.of(target, ".4g"), Cell.of(seconds, ".3g"), Cell.of(group.run.model.width)]
                numbers += [Cell(f"{value:.2f}×", value) if value else Cell("–") for value in multipliers]
                numbers.append(Cell.of(group.inputs_per_second, ",.0f"))
                rows.append([Cell(name, name, names.index(name)), *numbers])
    note = Markup(
        "<b>Seconds</b> of the fastest model of a structure to a loss, a mean over its seeds; its <b>width</b> and "
        "throughput. <b>Time multiplier</b>: how many times longer the fastest dense model needs for this loss. "
        "<b>Compute multiplier</b>: how many times the MACs of training dense needs, each structure with the model of "
        "the fewest."
    )
    return SortableTable(headings, rows, note)
