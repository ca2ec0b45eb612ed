"""Loss against the exponents psi, nu and omega of structures at equal compute, and the map of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from markupsafe import Markup, escape

from einlinear_lab.analysis.columns import Column
from einlinear_lab.analysis.comparison import Comparison, metric_title
from einlinear_lab.analysis.structure_map import (
    SIGNS,
    TOLERANCE,
    MapPoint,
    StructureMap,
    at_equal_compute,
    coefficient_columns,
    exponent_columns,
    map_columns,
    map_of,
)
from einlinear_lab.report.charts import Axis, Chart, Trace, axis, colour, glyph, log_axis, shade, short, symbol, trace
from einlinear_lab.report.page import CsvRow, Figure, Section, SortableTable
from einlinear_lab.report.points import group_row
from einlinear_lab.scaling import ExponentRegression

# rows of the table of a map
_ROWS = 20


_MEANINGS = {"omega": "parameters / MACs = n^−ω", "psi": "rank = n^ψ", "nu": "MACs = n^(1+ν)"}


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
    views = {title: [_exponent_chart(result, index, name, title) for name in SIGNS] for title, result in titled.items()}
    data: list[CsvRow] = []
    for metric, result in results.items():
        for point in result.points:
            row = {"curve": point.group.curve, "structure": point.structure, "macs": result.compute}
            data.append({**row, "metric": metric, "loss": point.loss, **point.exponents})
    caption = Markup("Lower is better. One mark per structure, the same in all panels; the table below is the legend.")
    exponents = {point.group.curve: point.exponents for result in results.values() for point in result.points}
    losses = [{point.group.curve: point.loss for point in result.points} for result in results.values()]
    names = [name for name in index if name in exponents]
    columns = [Column.of("structure", names), *exponent_columns([exponents[name] for name in names])]
    columns += [Column.of(title, map(by.get, names), ".4f") for title, by in zip(titled, losses, strict=True)]
    table = SortableTable.of(columns, curves=[index[name] for name in names])
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
    points = first.points[:_ROWS]
    table = SortableTable.of(map_columns(points, title), f"The {len(points)} models of the lowest loss.")
    return Section("Structure map", text, [figure], [table, *regressions])


def _exponent_axis(name: str) -> Axis:
    return axis(f"{SIGNS[name]}: {_MEANINGS[name]}", range=[-0.05, 1.05])


def _regression_table(regressions: Mapping[str, ExponentRegression | None]) -> list[SortableTable]:
    """Return the table of the regression on all exponents, by title of the metric, if there is one."""
    columns = coefficient_columns(regressions)
    note = (
        "Linear regression of log(loss / dense loss) on ψ − 1, ν − 1 and ω. One unit more of an exponent multiplies "
        "the loss by e to its coefficient. –: the data does not identify the coefficient."
    )
    return [SortableTable.of(columns, note)] if columns[0].values else []


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
    for x, y in combinations(reversed(SIGNS), 2):
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
