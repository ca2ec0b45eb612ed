"""Losses of structures at equal compute over their exponents psi, nu and omega, and the map of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import numpy as np
from markupsafe import Markup, escape

from einlinear.structures import structure
from einlinear.structures.spec import is_family, parse_family
from einlinear_lab.models.config import DENSE, ModelConfig
from einlinear_lab.report.charts import Axis, Chart, Trace, axis, colour, glyph, log_axis, shade, short, symbol, trace
from einlinear_lab.report.comparison import Comparison, SeedGroup, metric_title
from einlinear_lab.report.page import Cell, CsvRow, Figure, Section, SortableTable, group_row
from einlinear_lab.scaling import Coefficient, ExponentRegression, regress_on_exponents

# structures at equal compute, and of a map
MIN_CURVES, MIN_STRUCTURES = 5, 8
# largest deviation of the MACs of a map's models from their median, as a share
TOLERANCE = 0.1
# rows of the table of a map
_ROWS = 20
_SIGNS = {"omega": "ω", "psi": "ψ", "nu": "ν"}
_MEANINGS = {"omega": "parameters / MACs = n^−ω", "psi": "rank = n^ψ", "nu": "MACs = n^(1+ν)"}

# by name
Exponents = Mapping[str, float]


@dataclass(frozen=True)
class MapPoint:
    """A model, or a structure of interpolated loss; Pareto-optimal if no model is both better and faster to train."""

    group: SeedGroup
    exponents: Exponents
    loss: float
    is_pareto: bool = False

    @property
    def structure(self) -> str:
        return self.group.run.model.structure

    @property
    def kind(self) -> str:
        return kind_of(self.structure)


@dataclass(frozen=True)
class StructureMap:
    """Structures at some compute in MACs per input, and further unfinished ones by spec."""

    compute: float
    points: Sequence[MapPoint]
    regression: ExponentRegression | None
    unfinished: Mapping[str, Exponents] = field(default_factory=dict)


def at_equal_compute(comparison: Comparison, metric: str) -> StructureMap | None:
    """Interpolate all curves but naive controls at the largest compute that all reach; None with too few structures."""
    candidates = []
    for curve in comparison.curves:
        losses = [(group.result.macs, mean) for group in curve.best if (mean := group.mean(metric))]
        if losses and curve.structure_aware and (exponents := _exponents_of(curve.best[-1].run.model)):
            candidates.append((curve.best[-1], exponents, sorted(losses)))
    compute = float(min((losses[-1][0] for *_, losses in candidates), default=0))
    points = [
        MapPoint(group, exponents, math.exp(np.interp(math.log(compute), *np.log(losses).T)))
        for group, exponents, losses in candidates
        if losses[0][0] <= compute
    ]
    if len({point.structure for point in points}) < MIN_CURVES:
        return None
    dense = next((point.loss for point in points if point.structure == DENSE), None)
    return StructureMap(compute, points, _regression_of(points, dense) if dense else None)


def map_of(comparison: Comparison, metric: str) -> StructureMap | None:
    """Return the map of models with one structure; None with fewer than eight, or where a loss is not positive."""
    models: list[tuple[float, SeedGroup]] = []
    for curve in filter(lambda curve: curve.structure_aware, comparison.curves):
        groups = [group for group in curve.best if not getattr(group.run.model, "roles", {})]
        models += [(mean, group) for group in groups if (mean := group.mean(metric)) is not None]
    if not models or min(loss for loss, _ in models) <= 0:
        return None
    compute = median(group.result.macs for _, group in models)
    near = [(loss, group) for loss, group in models if abs(group.result.macs / compute - 1) <= TOLERANCE]
    points, fastest = list[MapPoint](), math.inf
    for loss, group in sorted(near, key=lambda item: item[0]):
        seconds = group.step_seconds
        is_pareto = seconds is not None and seconds < fastest
        fastest = min(fastest, seconds or fastest)
        if exponents := _exponents_of(group.run.model):
            points.append(MapPoint(group, exponents, loss, is_pareto))
    if len({point.structure for point in points}) < MIN_STRUCTURES:
        return None
    dense = [point.loss for point in points if point.structure == DENSE]
    regression = _regression_of(points, dense[0] if dense else median(point.loss for point in points))
    return StructureMap(float(compute), points, regression, _unfinished(comparison, points))


def kind_of(spec: str) -> str:
    """Return the kind of a structure: its family, and for a theta the best known family that contains it.

    >>> kind_of("einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))"), kind_of("monarch(blocks=4)")
    ('BTT', 'monarch')
    """
    if not is_family(spec):
        return "pattern"
    family, arguments = parse_family(spec)
    if family != "einsum":
        return family
    alpha, beta, gamma, delta, epsilon, phi, rho = arguments["theta"]
    if not (gamma or phi):
        if not (beta or delta):
            return "low rank"
        return "tensor train" if rho else "Kronecker"
    if not (beta or delta):
        return "BTT" if alpha + epsilon - rho <= 1 else "BTT of low rank"
    return "other einsum"


def section_at_equal_compute(comparison: Comparison) -> Section | None:
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
    views = {
        title: [_exponent_chart(result, index, name, title) for name in _SIGNS] for title, result in titled.items()
    }
    data: list[CsvRow] = []
    for metric, result in results.items():
        for point in result.points:
            names = {"curve": point.group.curve, "structure": point.structure, "macs": result.compute}
            data.append({**names, "metric": metric, "loss": point.loss, **point.exponents})
    caption = Markup("Lower is better. One mark per structure, the same in all panels; the table below is the legend.")
    exponents = {point.group.curve: point.exponents for result in results.values() for point in result.points}
    losses = [{point.group.curve: point.loss for point in result.points} for result in results.values()]
    rows = [
        [Cell(name, name, i), *_exponent_cells(exponents[name]), *(Cell.of(by.get(name), ".4f") for by in losses)]
        for name, i in index.items()
        if name in exponents
    ]
    table = SortableTable(("structure", *_SIGNS.values(), *titled), rows)
    tables = [table, *_regression_table({title: result.regression for title, result in titled.items()})]
    return Section("Loss against structure exponents", text, [Figure("exponents", caption, views, data)], tables)


def section(comparison: Comparison) -> Section | None:
    """Show the map, if at least eight structures have models of about the same compute."""
    maps = {metric: map_ for metric in comparison.metrics if (map_ := map_of(comparison, metric))}
    if not maps:
        return None
    titled = {metric_title(metric): map_ for metric, map_ in maps.items()}
    title, first = next(iter(titled.items()))
    best, compute = first.points[0], short(float(f"{first.compute:.3g}"))
    text = Markup("<p>{} structures at {} MACs per {}, within {:.0%}. The best is <b>{}</b> at width {}:</p>").format(
        len(first.points), compute, comparison.input, TOLERANCE, best.structure, best.group.run.model.width
    )
    text += Markup("<pre>import einlinear as el\n\nel.convert(model, {!r})</pre>").format(best.structure)
    kinds = list(dict.fromkeys(point.kind for point in first.points))
    caption = Markup(
        "Each mark is a model: the darker, the lower its loss; its symbol is the kind of structure: {}. The best model "
        "is larger. Last panel: the line is the Pareto front of loss and time per training step."
    ).format(", ".join(f"{glyph(i)} {kind}" for i, kind in enumerate(kinds)))
    if count := len(first.unfinished):
        caption += Markup(
            " Small crosses: structures whose runs were pruned or are not finished ({}); the regression leaves them "
            "out."
        ).format(count)
    data = []
    for metric, map_ in maps.items():
        for point in map_.points:
            values = {
                "kind": point.kind,
                "metric": metric,
                "loss": point.loss,
                "step_seconds": point.group.step_seconds,
            }
            data.append(group_row(point.group, **values, is_pareto=point.is_pareto, **point.exponents))
    figure = Figure("map", caption, {title: _map_charts(map_, kinds, title) for title, map_ in titled.items()}, data)
    regressions = _regression_table({title: map_.regression for title, map_ in titled.items()})
    return Section("Structure map", text, [figure], [map_table(first.points[:_ROWS], title), *regressions])


def map_table(points: Sequence[MapPoint], title: str) -> SortableTable:
    """Return the models with their exponents and their losses, under the title of the metric."""
    rows = []
    for point in points:
        names = [Cell.of(point.structure), Cell.of(point.kind), Cell.of(point.group.run.model.width)]
        macs, loss = Cell.of(point.group.result.macs, ","), Cell.of(point.loss, ".4f")
        rows.append([*names, macs, *_exponent_cells(point.exponents), loss])
    headings = ("structure", "kind", "width", "MACs", *_SIGNS.values(), title)
    return SortableTable(headings, rows, Markup("The {} models of the lowest loss.").format(len(rows)))


def coefficient_cells(regression: ExponentRegression | None) -> dict[str, list[Cell]]:
    """Return the coefficient and the interval of every exponent by its sign; – where they are not identified."""
    cells = {}
    for name, sign in _SIGNS.items() if regression else ():
        coefficient: Coefficient = getattr(regression, name)
        ends = coefficient.interval
        text = f"{ends.low:+.3f} to {ends.high:+.3f}" if ends else "–"
        cells[sign] = [Cell.of(coefficient.value if ends else None, "+.3f"), Cell(text)]
    return cells


def _exponents_of(model: ModelConfig) -> dict[str, float]:
    """Return the exponents of a model's structure by name; none if its family is not registered."""
    try:
        built = structure(model.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(built, name) for name in _SIGNS}


def _regression_of(points: Sequence[MapPoint], dense: float) -> ExponentRegression:
    """Regress losses on exponents, relative to the dense loss."""
    psi, nu, omega = ([point.exponents[name] for point in points] for name in ("psi", "nu", "omega"))
    return regress_on_exponents(psi, nu, omega, [point.loss for point in points], dense)


def _unfinished(comparison: Comparison, points: Sequence[MapPoint]) -> dict[str, Exponents]:
    folders = {record.folder.parent for point in points for record in point.group.records}
    models = [record.run.model for record in comparison.unfinished if record.folder.parent in folders]
    finished = {point.structure for point in points}
    models = [model for model in models if not getattr(model, "roles", {}) and model.structure not in finished]
    return {model.structure: exponents for model in models if (exponents := _exponents_of(model))}


def _exponent_axis(name: str) -> Axis:
    return axis(f"{_SIGNS[name]}: {_MEANINGS[name]}", range=[-0.05, 1.05])


def _exponent_cells(exponents: Exponents) -> list[Cell]:
    return [Cell.of(exponents[name], ".3g") for name in _SIGNS]


def _regression_table(regressions: Mapping[str, ExponentRegression | None]) -> list[SortableTable]:
    """Return the table of the regression on all exponents, by title of the metric, if there is one."""
    rows = []
    for title, regression in regressions.items():
        if regression:
            r_squared = Cell.of(regression.r_squared if math.isfinite(regression.r_squared) else None, ".2f")
            for sign, cells in coefficient_cells(regression).items():
                rows.append([Cell.of(f"{sign}, {title}"), *cells, r_squared])
    note = Markup(
        "Linear regression of log(loss / dense loss) on ψ − 1, ν − 1 and ω. One unit more of an exponent multiplies "
        "the loss by e to its coefficient. –: the data does not identify the coefficient."
    )
    return [SortableTable(("exponent", "coefficient", "95 % interval", "R²"), rows, note)] if rows else []


def _exponent_chart(result: StructureMap, index: Mapping[str, int], exponent: str, title: str) -> Chart:
    traces = []
    for point in result.points:
        name, x, label = point.group.curve, point.exponents[exponent], "<br>%{x:.3g}: %{y:.4g}"
        hue, mark = colour(index[name]), symbol(index[name])
        traces.append(trace([x], [point.loss], hue, f"{escape(name)}{label}", name=name, symbol=mark, marker_size=10))
    losses = log_axis([point.loss for point in result.points], title)
    return Chart(traces, _exponent_axis(exponent), losses, height=320, legend=False)


def _map_charts(map_: StructureMap, kinds: Sequence[str], title: str) -> list[Chart]:
    """Draw the plane of every pair of exponents, and loss over time."""
    charts, points = [], map_.points
    for x, y in combinations(reversed(_SIGNS), 2):
        pruned = [
            trace([e[x]], [e[y]], "#999", f"{escape(spec)}<br>not finished", symbol="x-thin-open", marker_size=6)
            for spec, e in map_.unfinished.items()
        ]
        marks = _marks(points, kinds, [(point.exponents[x], point.exponents[y]) for point in points])
        charts.append(Chart([*pruned, *marks], _exponent_axis(x), _exponent_axis(y), height=340, legend=False))
    timed = [(1000 * s, point.loss) if (s := point.group.step_seconds) else None for point in points]
    front = sorted(xy for xy, point in zip(timed, points, strict=True) if xy and point.is_pareto)
    line = [trace([ms for ms, _ in front], [loss for _, loss in front], "#999", line=2)] if front else []
    x_axis = log_axis([xy[0] for xy in timed if xy], "milliseconds per training step")
    y_axis = log_axis([point.loss for point in points], title)
    return [*charts, Chart([*line, *_marks(points, kinds, timed)], x_axis, y_axis, height=340, legend=False)]


def _marks(points: Sequence[MapPoint], kinds: Sequence[str], places: Sequence[Sequence[float] | None]) -> list[Trace]:
    """Draw the models that have a place, the best on top."""
    marks = []
    for rank, (point, place) in reversed([*enumerate(zip(points, places, strict=True))]):
        if place:
            label = f"{escape(point.structure)}<br>{escape(point.kind)}, loss {point.loss:.4g}"
            mark, size = symbol(kinds.index(point.kind)), 10 if rank else 14
            marks.append(trace(place[:1], place[1:], shade(rank, len(points)), label, symbol=mark, marker_size=size))
    return marks
