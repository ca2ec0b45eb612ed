"""Loss against seconds of training: the frontier of every structure, and how many times longer dense needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, symbol, trace
from einlinear_lab.report.comparison import Comparison, Curve, SeedGroup, dense_of, logged, metric_title
from einlinear_lab.report.page import Cell, CsvRow, Figure, Section, SortableTable, hover, run_row
from einlinear_lab.runs.records import Record

# columns of the table
_TARGETS = 5
# points of a frontier
_POINTS = 24

Cost = Literal["seconds", "macs"]


class Evaluation(NamedTuple):
    """The seconds and the MACs of training so far, and the loss."""

    seconds: float
    macs: float
    loss: float


@dataclass(frozen=True)
class TimedModel:
    """A model at its best learning rate, and the runs of it that were evaluated during training."""

    group: SeedGroup
    runs: tuple[tuple[Record, tuple[Evaluation, ...]], ...]

    @property
    def first(self) -> float:
        """The lowest loss of a first evaluation."""
        return min(run[0].loss for _, run in self.runs)

    @property
    def lowest(self) -> float:
        """The lowest loss that all seeds reach; infinite where one of them diverged."""
        losses = [min(evaluation.loss for evaluation in run) for _, run in self.runs]
        return max(losses) if len(losses) == len(self.group.records) else math.inf

    def to(self, target: float, cost: Cost) -> float | None:
        """Return the mean cost over the seeds to reach a loss; None unless all seeds reach it."""
        costs = [cost_to([(getattr(e, cost), e.loss) for e in run], target) for _, run in self.runs]
        reached = [value for value in costs if value is not None]
        return fmean(reached) if reached and len(reached) == len(self.group.records) else None


@dataclass(frozen=True)
class TimeFrontier:
    """The lower envelope of all models of a curve: the least cost at which one of them reaches a loss."""

    curve: Curve
    models: tuple[TimedModel, ...]

    @property
    def first(self) -> float:
        """The lowest loss of a first evaluation: the cost of a higher loss was not measured."""
        return min(model.first for model in self.models)

    @property
    def lowest(self) -> float:
        """The lowest loss that a model reaches with all of its seeds; infinite where none does."""
        return min(model.lowest for model in self.models)

    def to(self, target: float, cost: Cost = "seconds") -> tuple[float, SeedGroup] | None:
        """Return the least cost of a loss, and the model; None where no model reaches the loss with all seeds."""
        costs = [(value, model.group) for model in self.models if (value := model.to(target, cost)) is not None]
        return min(costs, key=lambda pair: pair[0], default=None)


@dataclass(frozen=True)
class MultiplierAtLoss:
    """How many times the seconds and the MACs of training the dense frontier needs for a loss."""

    loss: float
    time: float
    compute: float


def frontiers_of(comparison: Comparison) -> list[TimeFrontier]:
    """Return the frontiers of the curves whose runs were evaluated during training."""
    frontiers = []
    for curve in comparison.curves:
        models = tuple(model for group in curve.best if (model := _timed_model(group, comparison.error)).runs)
        if models:
            frontiers.append(TimeFrontier(curve, models))
    return frontiers


def target_losses(frontiers: Sequence[TimeFrontier]) -> list[float]:
    """Return losses, even in log: from the highest that all frontiers measured to the lowest that two reach."""
    lowest = sorted(frontier.lowest for frontier in frontiers)
    if len(lowest) < 2:
        return []
    return _losses(min(frontier.first for frontier in frontiers), lowest[1], _TARGETS)


def multipliers_over(frontier: TimeFrontier, dense: TimeFrontier) -> list[MultiplierAtLoss]:
    """Return multipliers at the losses that both frontiers measured; none without any."""
    losses = _losses(min(frontier.first, dense.first), max(frontier.lowest, dense.lowest), _POINTS)
    return [at for loss in losses if (at := multiplier_at(frontier, dense, loss))]


def multiplier_at(frontier: TimeFrontier, dense: TimeFrontier, loss: float) -> MultiplierAtLoss | None:
    """Return the multipliers at a loss; None where one of the frontiers does not reach it."""
    ratios = []
    for cost in ("seconds", "macs"):
        ours, theirs = frontier.to(loss, cost), dense.to(loss, cost)
        if ours is None or theirs is None:
            return None
        ratios.append(theirs[0] / ours[0])
    return MultiplierAtLoss(loss, *ratios)


def cost_to(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the cost at which a run first reaches a loss, interpolated between evaluations; None if it never does.

    >>> cost_to([(10.0, 3.0), (20.0, 2.0), (30.0, 1.5)], 2.5)
    15.0
    """
    for (before, high), (cost, loss) in zip([*points[:1], *points], points, strict=False):
        if loss <= target:
            return before + (high - target) / (high - loss) * (cost - before) if high > loss else cost
    return None


def section(comparison: Comparison) -> Section | None:
    """Show losses over training time, if runs were evaluated during training and two curves reach a common loss."""
    frontiers = frontiers_of(comparison)
    targets = target_losses(frontiers)
    if not targets:
        return None
    text = Markup(
        "<p>Seconds of training, without data loading, evaluations and compilation. Runs of <code>einlinear compare "
        "--clock</code> take turns; runs that trained side by side slowed each other down.</p>"
    )
    figures = [_curves(comparison, frontiers), *_multipliers(comparison, frontiers)]
    return Section("Loss against seconds", text, figures, [_table(comparison, frontiers, targets)])


def _timed_model(group: SeedGroup, metric: str) -> TimedModel:
    """Read the evaluations of a model; a run with a single one, after the training, counts as none."""
    runs = []
    for record in group.good:
        # an error of zero has no logarithm
        points = [(step, seconds, loss) for step, seconds, loss in logged(record, metric) if loss > 0]
        run = tuple(Evaluation(seconds, group.compute_at(step), loss) for step, seconds, loss in points)
        runs += [(record, run)] if len(run) > 1 else []
    return TimedModel(group, tuple(runs))


def _losses(high: float, low: float, count: int) -> list[float]:
    """Return losses from high to just above low, even in log; none for an empty range."""
    return np.geomspace(high, 1.001 * low, count).tolist() if 0 < 1.001 * low < high else []


def _curves(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> Figure:
    metric = comparison.error
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
    envelope = [(frontier.to(loss), loss) for loss in _losses(frontier.first, frontier.lowest, _POINTS)]
    points = [(*found, loss) for found, loss in envelope if found]
    texts = [hover(*group.good) for _, group, _ in points]
    look = partial(draw, hover=f"%{{customdata}}{label}", texts=texts, line=2.5, showlegend=True)
    traces.append(look([seconds for seconds, *_ in points], [loss for *_, loss in points]))
    return traces


def _multipliers(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> list[Figure]:
    """Show the multipliers over time and compute of every structure against dense; no figure without any."""
    over = {frontier.curve.name: multipliers_over(frontier, dense) for frontier, dense in _pairs(comparison, frontiers)}
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
    chart = Chart(traces, log_axis(losses, metric_title(comparison.error)), log_axis(ends, "multiplier"), baseline=1)
    return [Figure("time-multipliers", caption, {"": [chart]}, data)]


def _table(comparison: Comparison, frontiers: Sequence[TimeFrontier], targets: Sequence[float]) -> SortableTable:
    names = [curve.name for curve in comparison.curves]
    dense = {frontier.curve.name: reference for frontier, reference in _pairs(comparison, frontiers)}
    headings = ["structure", metric_title(comparison.error), "seconds", "width", "time multiplier"]
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
                numbers.append(Cell.of(_inputs_per_second(group), ",.0f"))
                rows.append([Cell(name, name, names.index(name)), *numbers])
    note = Markup(
        "<b>Seconds</b> of the fastest model of a structure to a loss, a mean over its seeds; its <b>width</b> and "
        "throughput. <b>Time multiplier</b>: how many times longer the fastest dense model needs for this loss. "
        "<b>Compute multiplier</b>: how many times the MACs of training dense needs, each structure with the model of "
        "the fewest."
    )
    return SortableTable(headings, rows, note)


def _inputs_per_second(group: SeedGroup) -> float | None:
    """Return the training throughput in images, tokens or vectors per second."""
    return group.result.inputs / group.step_seconds if group.step_seconds else None


def _pairs(comparison: Comparison, frontiers: Sequence[TimeFrontier]) -> list[tuple[TimeFrontier, TimeFrontier]]:
    """Return every frontier with that of its dense curve, except those of dense curves themselves."""
    by_name: Mapping[str, TimeFrontier] = {frontier.curve.name: frontier for frontier in frontiers}
    pairs = []
    for frontier in frontiers:
        dense = dense_of(frontier.curve, comparison.curves)
        if dense and dense is not frontier.curve and dense.name in by_name:
            pairs.append((frontier, by_name[dense.name]))
    return pairs
