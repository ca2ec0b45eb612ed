"""Structure exponents and loss: the losses of structures at equal compute over psi, nu and omega."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from einlinear.structures import structure
from einlinear_lab.models.config import DENSE, ModelConfig
from einlinear_lab.report.charts import Axis, Chart, axis, colour, log_axis, short, symbol, trace
from einlinear_lab.report.comparison import Comparison, Curve, metric_title
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable
from einlinear_lab.scaling import Coefficient, ExponentRegression, regress_on_exponents

MIN_STRUCTURES = 5
EXPONENTS = ("omega", "psi", "nu")
SIGNS = {"omega": "ω", "psi": "ψ", "nu": "ν"}
_MEANINGS = {"omega": "parameters / MACs = n^−ω", "psi": "rank = n^ψ", "nu": "MACs = n^(1+ν)"}


@dataclass(frozen=True)
class CurvePoint:
    """A curve at some compute: its exponents by name, and its loss, interpolated in log-log space."""

    curve: Curve
    exponents: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class EqualCompute:
    """The structures of a comparison at equal compute.

    Attributes:
        compute: MACs per input, the largest that all structures reach.
        points: one for each curve, in the order of the comparison.
        regression: of the loss against that of dense on the exponents; None without dense.
    """

    compute: float
    points: tuple[CurvePoint, ...]
    regression: ExponentRegression | None


def at_equal_compute(comparison: Comparison, metric: str) -> EqualCompute | None:
    """Interpolate all curves at the largest compute that all reach; None with fewer than five structures.

    Naive curves are controls and left out.
    """
    candidates = []
    for curve in comparison.curves:
        losses = [(group.result.macs, mean) for group in curve.best if (mean := group.mean(metric))]
        if losses and curve.structure_aware and (exponents := exponents_of(curve.best[-1].run.model)):
            candidates.append((curve, exponents, sorted(losses)))
    compute = float(min((losses[-1][0] for *_, losses in candidates), default=0))
    points = tuple(
        CurvePoint(curve, exponents, math.exp(np.interp(math.log(compute), *np.log(losses).T)))
        for curve, exponents, losses in candidates
        if losses[0][0] <= compute
    )
    if len({point.curve.structure for point in points}) < MIN_STRUCTURES:
        return None
    dense = next((point.loss for point in points if point.curve.structure == DENSE), None)
    regression = regression_of([(point.exponents, point.loss) for point in points], dense) if dense else None
    return EqualCompute(compute, points, regression)


def exponents_of(model: ModelConfig) -> dict[str, float]:
    """Return the exponents of a model's structure by name; none if its family is not registered."""
    try:
        built = structure(model.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(built, name) for name in EXPONENTS}


def regression_of(points: Sequence[tuple[Mapping[str, float], float]], dense: float) -> ExponentRegression:
    """Regress losses on exponents by name, relative to the dense loss."""
    psi, nu, omega = ([exponents[name] for exponents, _ in points] for name in ("psi", "nu", "omega"))
    return regress_on_exponents(psi, nu, omega, [loss for _, loss in points], dense)


def section(comparison: Comparison) -> Section | None:
    """Show losses over exponents, if at least five structures have models around the same compute."""
    results = {metric: result for metric in comparison.metrics if (result := at_equal_compute(comparison, metric))}
    if not results:
        return None
    text = Markup(
        "<p>Losses at {} MACs per {}, the largest compute that all structures reach, interpolated between models in "
        "log-log space. ω = 0: every parameter is used once; ψ = 1: full rank; ν = 1: the compute of dense.</p>"
    ).format(short(float(f"{next(iter(results.values())).compute:.3g}")), comparison.input)
    index = {curve.name: i for i, curve in enumerate(comparison.curves)}
    titled = {metric_title(metric): result for metric, result in results.items()}
    views = {title: [_chart(result, index, name, title) for name in EXPONENTS] for title, result in titled.items()}
    data = [
        {
            "curve": point.curve.name,
            "structure": point.curve.structure,
            "macs": result.compute,
            "metric": metric,
            "loss": point.loss,
            **point.exponents,
        }
        for metric, result in results.items()
        for point in result.points
    ]
    caption = Markup("Lower is better. One mark per structure, the same in all panels; the table below is the legend.")
    regressions = {title: result.regression for title, result in titled.items()}
    tables = [_table(titled, index), *regression_table(regressions)]
    return Section("Loss against structure exponents", text, [Figure("exponents", caption, views, data)], tables)


def exponent_axis(name: str) -> Axis:
    """Return the axis of an exponent, from 0 to 1."""
    return axis(f"{SIGNS[name]}: {_MEANINGS[name]}", range=[-0.05, 1.05])


def exponent_cells(exponents: Mapping[str, float]) -> list[Cell]:
    """Return the exponents as cells."""
    return [Cell.of(exponents[name], ".3g") for name in EXPONENTS]


def coefficient_cells(regression: ExponentRegression) -> dict[str, list[Cell]]:
    """Return the coefficient and the interval of every exponent by its sign; – where they are not identified."""
    cells = {}
    for name in EXPONENTS:
        coefficient: Coefficient = getattr(regression, name)
        ends = coefficient.interval
        text = f"{ends.low:+.3f} to {ends.high:+.3f}" if ends else "–"
        cells[SIGNS[name]] = [Cell.of(coefficient.value if ends else None, "+.3f"), Cell(text)]
    return cells


def regression_table(regressions: Mapping[str, ExponentRegression | None]) -> list[SortableTable]:
    """Return the table of the regression on all exponents, by title of the metric, if there is one."""
    rows = []
    for title, regression in regressions.items():
        if regression is not None:
            r_squared = Cell.of(regression.r_squared if math.isfinite(regression.r_squared) else None, ".2f")
            for sign, cells in coefficient_cells(regression).items():
                rows.append([Cell.of(f"{sign}, {title}"), *cells, r_squared])
    note = Markup(
        "Linear regression of log(loss / dense loss) on ψ − 1, ν − 1 and ω. One unit more of an exponent multiplies "
        "the loss by e to its coefficient. –: the data does not identify the coefficient."
    )
    return [SortableTable(("exponent", "coefficient", "95 % interval", "R²"), rows, note)] if rows else []


def _chart(result: EqualCompute, index: Mapping[str, int], exponent: str, title: str) -> Chart:
    traces = []
    for point in result.points:
        name, x, label = point.curve.name, point.exponents[exponent], "<br>%{x:.3g}: %{y:.4g}"
        hue, mark = colour(index[name]), symbol(index[name])
        traces.append(trace([x], [point.loss], hue, f"{escape(name)}{label}", name=name, symbol=mark, size=10))
    losses = log_axis([point.loss for point in result.points], title)
    return Chart(traces, exponent_axis(exponent), losses, height=320, legend=False)


def _table(results: Mapping[str, EqualCompute], index: Mapping[str, int]) -> SortableTable:
    exponents = {point.curve.name: point.exponents for result in results.values() for point in result.points}
    losses = [{point.curve.name: point.loss for point in result.points} for result in results.values()]
    rows = [
        [Cell(name, name, i), *exponent_cells(exponents[name]), *(Cell.of(by.get(name), ".4f") for by in losses)]
        for name, i in index.items()
        if name in exponents
    ]
    return SortableTable(("structure", *SIGNS.values(), *results), rows)
