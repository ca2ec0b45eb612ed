"""Scaling laws: the loss of every structure over compute, and the power law through its frontier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from einlinear_lab import scaling
from einlinear_lab.report.charts import Chart, Trace, colour, log_axis, symbol, trace
from einlinear_lab.report.comparison import (
    LENGTHS,
    Comparison,
    Curve,
    SeedGroup,
    dense_of,
    logged,
    make_curves,
    metric_title,
    result_of,
)
from einlinear_lab.report.compute_multipliers import figure_along, figure_of_models
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable, hover, run_row
from einlinear_lab.runs.records import Record
from einlinear_lab.scaling.fit import check_rules

LAW_HEADINGS = ("exponent", "95 % interval", "R²", "scale", "floor", "models", "points", "compute multiplier")
_RESAMPLES = 300
# a frontier of every model that no cheaper one beats, however far above the hull
_NO_HULL: Mapping[str, Any] = {"tolerance": 1e9}

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


@dataclass(frozen=True)
class CurveFit:
    """The scaling law of one curve.

    Attributes:
        groups, losses: the models with a positive loss, each at its best learning rate, and their loss curves.
        fit: the frontier and the law; None where no law can be fitted.
        reason: why no law can be fitted.
        multipliers: compute multipliers along the frontier against dense; empty without a dense curve.
    """

    curve: Curve
    groups: tuple[SeedGroup, ...]
    losses: tuple[scaling.LossCurves, ...]
    fit: scaling.ScalingFit | None
    reason: str = ""
    multipliers: tuple[scaling.MultiplierAt, ...] = ()

    @property
    def interval(self) -> scaling.Interval | None:
        """The confidence interval of the exponent: from seeds if every model has several, else from the regression."""
        return (self.fit.interval("exponent") or self.fit.interval("exponent", "regression")) if self.fit else None

    @property
    def multiplier(self) -> scaling.MultiplierAt | None:
        """The multiplier at the largest compute where the dense frontier gives an exact one; else the last bound."""
        exact = [point for point in self.multipliers if not point.multiplier.bound]
        return next(reversed(exact or self.multipliers), None)

    def predict(self, compute: float) -> scaling.Prediction | None:
        """Predict the loss at a compute, with an interval of the same source as that of the exponent."""
        return self.fit.predict(compute, "seeds" if self.fit.draws else "regression") if self.fit else None


@dataclass(frozen=True)
class ScalingLaws:
    """The fits of all curves: a metric over some compute (in words), with an assumed floor or a fitted one (None)."""

    metric: str
    compute: str
    floor: float | None
    curves: tuple[CurveFit, ...]


def laws_per_input(comparison: Comparison, metric: str, floor: float | None = 0.0) -> ScalingLaws:
    """Fit final losses at the best learning rates over the MACs of one input, of models that no cheaper one beats.

    The floor is an assumed irreducible loss; None fits it. (arXiv 2406.06248 fits all models.)
    """

    def final(group: SeedGroup) -> scaling.LossCurves:
        return scaling.LossCurves(
            np.array([float(group.result.macs)]), np.array(group.values(metric), dtype=float)[:, None]
        )

    fits = _fit_all(comparison.curves, final, floor, _NO_HULL)
    return ScalingLaws(metric, f"MACs per {comparison.input}", floor, fits)


def laws_of_training(comparison: Comparison, floor: float | None = 0.0, **rules: Any) -> ScalingLaws | None:
    """Fit the error during training over the MACs of all forward passes so far; None without evaluations in training.

    The rules are `tolerance`, `window` and `prune` of `scaling.pareto_frontier`. Runs of several lengths share a law.
    """
    check_rules(**rules)
    curves = make_curves(comparison.records, shared=LENGTHS)
    fits = _fit_all(curves, lambda group: evaluations(group, comparison.error), floor, rules)
    if all(len(losses.compute) == 1 for fit in fits for losses in fit.losses):
        return None
    return ScalingLaws(comparison.error, "MACs of training", floor, fits)


def evaluations(group: SeedGroup, metric: str) -> scaling.LossCurves:
    """Return a metric during the training of one model, at the steps at which all of its seeds were evaluated."""
    seeds = []
    for record in group.good:
        by_step = {step: value for step, _, value in logged(record, metric)}
        # the final value alone where it was not measured during training
        seeds.append(by_step or {result_of(record).steps: result_of(record).metrics[metric]})
    steps = sorted(set(seeds[0]).intersection(*seeds))
    compute = [group.compute_at(step) for step in steps]
    losses = [[values[step] for step in steps] for values in seeds]
    return scaling.LossCurves(np.array(compute, dtype=float), np.array(losses, dtype=float))


def laws_as_json(laws: ScalingLaws, computes: Sequence[float] = ()) -> dict[str, Any]:
    """Return all numbers as JSON values, with the losses predicted at some computes; NaN and infinities become None."""

    def law(fit: CurveFit) -> dict[str, Any]:
        if fit.fit is None:
            return {"no_law_reason": fit.reason}
        return {
            **asdict(fit.fit.law),
            "exponent_interval": asdict(fit.interval) if fit.interval else None,
            "frontier": np.stack([fit.fit.frontier.compute, fit.fit.frontier.loss], axis=1).tolist(),
            "compute_multipliers": [
                {**asdict(point), "multiplier": point.multiplier.value, "bound": point.multiplier.bound}
                for point in fit.multipliers
            ],
            "predictions": [asdict(prediction) for compute in computes if (prediction := fit.predict(compute))],
        }

    structures = [
        {"name": fit.curve.name, "structure": fit.curve.structure, "models": len(fit.groups), **law(fit)}
        for fit in laws.curves
    ]
    content = {"metric": laws.metric, "compute": laws.compute, "assumed_floor": laws.floor, "structures": structures}
    return dict(json.loads(json.dumps(content), parse_constant=lambda constant: None))


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


def law_cells(fit: CurveFit, digits: int = 3) -> dict[str, Cell]:
    """Return the numbers of a scaling law by heading; none without a law."""
    if fit.fit is None:
        return {}
    law, interval, multiplier = fit.fit.law, fit.interval, fit.multiplier
    doubt = " (not identified)" if law.floor_identified is False else ""
    ends = f"{interval.low:.{digits}f} to {interval.high:.{digits}f}, {interval.source}" if interval else "–"
    return {
        "exponent": Cell.of(law.exponent, f".{digits}f"),
        "95 % interval": Cell(ends),
        "R²": Cell.of(law.r_squared if math.isfinite(law.r_squared) else None, f".{digits}f"),
        "scale": Cell.of(law.scale, f".{digits}g"),
        "floor": Cell(f"{law.floor:.{digits}g}{doubt}", law.floor),
        "models": Cell.of(len(fit.groups)),
        "points": Cell.of(len(fit.fit.frontier.index)),
        "compute multiplier": Cell(str(multiplier), multiplier.multiplier.value) if multiplier else Cell("–"),
    }


def _fit_all(
    curves: Sequence[Curve],
    losses: Callable[[SeedGroup], scaling.LossCurves],
    floor: float | None,
    rules: Mapping[str, Any],
) -> tuple[CurveFit, ...]:
    """Fit every curve, and compare it with its dense curve."""
    fits: dict[str, CurveFit] = {}
    for curve in curves:
        models = [(group, _positive(losses(group), floor or 0.0)) for group in curve.best if group.good]
        models = [(group, positive) for group, positive in models if positive.compute.size]
        unfitted = CurveFit(curve, tuple(group for group, _ in models), tuple(losses for _, losses in models), None)
        try:
            law = scaling.fit_scaling(unfitted.losses, floor=floor, resamples=_RESAMPLES, **rules)
            fits[curve.name] = replace(unfitted, fit=law)
        except ValueError as error:
            fits[curve.name] = replace(unfitted, reason=str(error))
    for curve in curves:
        dense, fit = dense_of(curve, curves), fits[curve.name]
        if dense and dense is not curve and fit.fit and (reference := fits[dense.name].fit):
            fits[curve.name] = replace(fit, multipliers=scaling.multipliers_along(fit.fit, reference))
    return tuple(fits.values())


def _positive(curve: scaling.LossCurves, floor: float) -> scaling.LossCurves:
    """Leave out the losses without a logarithm: an error of zero, or at an assumed floor."""
    good = (curve.losses > floor).all(0)
    return scaling.LossCurves(curve.compute[good], curve.losses[:, good])


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
    has_floor = laws.floor is None or laws.floor > 0
    names = [name for name in LAW_HEADINGS if name != "floor" or has_floor]
    rows = []
    for i, fit in enumerate(laws.curves):
        cells = law_cells(fit) or {"95 % interval": Cell(fit.reason)}
        rows.append([Cell(fit.curve.name, fit.curve.name, i), *(cells.get(name, Cell("–")) for name in names)])
    note = Markup(frontier) + Markup(_NOTE).format(floor="floor + " if has_floor else "")
    return SortableTable((metric_title(laws.metric), *names), rows, note)
