"""Structure map: structures of about equal compute in the space of exponents, their losses and their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from markupsafe import Markup, escape

from einlinear.structures.spec import is_family, parse_family
from einlinear_lab.models.config import DENSE
from einlinear_lab.report.charts import Chart, Trace, glyph, log_axis, shade, short, symbol, trace
from einlinear_lab.report.comparison import Comparison, SeedGroup, metric_title
from einlinear_lab.report.exponents import (
    EXPONENTS,
    SIGNS,
    exponent_axis,
    exponent_cells,
    exponents_of,
    regression_of,
    regression_table,
)
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable, group_row
from einlinear_lab.scaling import ExponentRegression

MIN_STRUCTURES = 8
# largest deviation of the MACs of a map's models from their median, as a share
TOLERANCE = 0.1
# rows of the table
_ROWS = 20


@dataclass(frozen=True)
class MapPoint:
    """A model on the map.

    Attributes:
        group, loss: its runs, and their mean loss.
        kind, exponents: the kind of its structure, see `kind_of`, and the exponents by name.
        is_pareto: whether no other model is both better and faster to train.
    """

    group: SeedGroup
    kind: str
    exponents: Mapping[str, float]
    loss: float
    is_pareto: bool = False

    @property
    def structure(self) -> str:
        """The spec of the structure."""
        return self.group.run.model.structure


@dataclass(frozen=True)
class StructureMap:
    """Models of about equal compute.

    Attributes:
        compute: MACs per input, the median over the models.
        points: the models, lowest loss first.
        regression: of the log loss on the exponents.
        unfinished: spec -> exponents of further structures of the same folders, whose runs were pruned or are not
            finished.
    """

    compute: float
    points: tuple[MapPoint, ...]
    regression: ExponentRegression
    unfinished: Mapping[str, Mapping[str, float]]


def map_of(comparison: Comparison, metric: str) -> StructureMap | None:
    """Return the map of a comparison; None with fewer than eight structures, or where a loss is not positive.

    Models whose layers have different structures are left out.
    """
    models: list[tuple[float, SeedGroup]] = []
    for curve in filter(lambda curve: curve.structure_aware, comparison.curves):
        groups = [group for group in curve.best if not getattr(group.run.model, "roles", {})]
        models += [(mean, group) for group in groups if (mean := group.mean(metric)) is not None]
    if not models or min(loss for loss, _ in models) <= 0:
        return None
    compute = median(group.result.macs for _, group in models)
    near = [(loss, group) for loss, group in models if abs(group.result.macs / compute - 1) <= TOLERANCE]
    if len({group.run.model.structure for _, group in near}) < MIN_STRUCTURES:
        return None
    points, fastest = list[MapPoint](), float("inf")
    for loss, group in sorted(near, key=lambda item: item[0]):
        seconds = group.step_seconds
        is_pareto = seconds is not None and seconds < fastest
        fastest = min(fastest, seconds or fastest)
        if exponents := exponents_of(group.run.model):
            points.append(MapPoint(group, kind_of(group.run.model.structure), exponents, loss, is_pareto))
    if len(points) < MIN_STRUCTURES:
        return None
    dense = [point.loss for point in points if point.structure == DENSE]
    reference = dense[0] if dense else median(point.loss for point in points)
    regression = regression_of([(point.exponents, point.loss) for point in points], reference)
    return StructureMap(float(compute), tuple(points), regression, _unfinished(comparison, points))


def kind_of(spec: str) -> str:
    """Return the kind of a structure: its family, and for a theta the best known family that contains it.

    >>> kind_of("einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))"), kind_of("einsum(theta=(1, 0, 0, 0, 1, 0, 1/2))")
    ('BTT', 'low rank')
    >>> kind_of("monarch(blocks=4)"), kind_of("einsum(theta=(1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0))")
    ('monarch', 'other einsum')
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


def section(comparison: Comparison) -> Section | None:
    """Show the map, if at least eight structures have models of about the same compute."""
    maps = {metric: map_ for metric in comparison.metrics if (map_ := map_of(comparison, metric))}
    if not maps:
        return None
    titled = {metric_title(metric): map_ for metric, map_ in maps.items()}
    title, first = next(iter(titled.items()))
    best = first.points[0]
    text = Markup(
        "<p>{} structures at {} MACs per {}, within {:.0%}. The best is <b>{}</b> at width {}:</p>"
        "<pre>import einlinear as el\n\nel.convert(model, {!r})</pre>"
    ).format(
        len(first.points),
        short(float(f"{first.compute:.3g}")),
        comparison.input,
        TOLERANCE,
        best.structure,
        best.group.run.model.width,
        best.structure,
    )
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
    data = [
        group_row(
            point.group,
            kind=point.kind,
            metric=metric,
            loss=point.loss,
            step_seconds=point.group.step_seconds,
            is_pareto=point.is_pareto,
            **point.exponents,
        )
        for metric, map_ in maps.items()
        for point in map_.points
    ]
    views = {title: _charts(map_, kinds, title) for title, map_ in titled.items()}
    regressions = regression_table({title: map_.regression for title, map_ in titled.items()})
    figure = Figure("map", caption, views, data)
    return Section("Structure map", text, [figure], [map_table(first.points[:_ROWS], title), *regressions])


def _unfinished(comparison: Comparison, points: Sequence[MapPoint]) -> dict[str, dict[str, float]]:
    folders = {record.folder.parent for point in points for record in point.group.records}
    models = [record.run.model for record in comparison.unfinished if record.folder.parent in folders]
    finished = {point.structure for point in points}
    models = [model for model in models if not getattr(model, "roles", {}) and model.structure not in finished]
    return {model.structure: exponents for model in models if (exponents := exponents_of(model))}


def _charts(map_: StructureMap, kinds: Sequence[str], title: str) -> list[Chart]:
    """Draw the plane of every pair of exponents, and loss over time."""
    charts, points = [], map_.points
    for x, y in combinations(reversed(EXPONENTS), 2):
        pruned = [
            trace([e[x]], [e[y]], "#999", f"{escape(spec)}<br>not finished", symbol="x-thin-open", size=6)
            for spec, e in map_.unfinished.items()
        ]
        marks = _marks(points, kinds, [(point.exponents[x], point.exponents[y]) for point in points])
        charts.append(Chart([*pruned, *marks], exponent_axis(x), exponent_axis(y), height=340, legend=False))
    timed = [(1000 * s, point.loss) if (s := point.group.step_seconds) else None for point in points]
    front = sorted(xy for xy, point in zip(timed, points, strict=True) if xy and point.is_pareto)
    line = [trace([ms for ms, _ in front], [loss for _, loss in front], "#999", line=2)] if front else []
    x_axis = log_axis([xy[0] for xy in timed if xy], "milliseconds per training step")
    y_axis = log_axis([point.loss for point in points], title)
    return [*charts, Chart([*line, *_marks(points, kinds, timed)], x_axis, y_axis, height=340, legend=False)]


def _marks(
    points: Sequence[MapPoint], kinds: Sequence[str], places: Sequence[tuple[float, float] | None]
) -> list[Trace]:
    """Draw the models that have a place, the best on top."""
    marks = []
    for rank, (point, place) in reversed([*enumerate(zip(points, places, strict=True))]):
        if place:
            label = f"{escape(point.structure)}<br>{escape(point.kind)}, loss {point.loss:.4g}"
            mark, size = symbol(kinds.index(point.kind)), 10 if rank else 14
            marks.append(trace(place[:1], place[1:], shade(rank, len(points)), label, symbol=mark, size=size))
    return marks


def map_table(points: Sequence[MapPoint], title: str) -> SortableTable:
    """Return the models with their exponents and their losses, under the title of the metric."""
    headings = ("structure", "kind", "width", "MACs", *SIGNS.values(), title)
    rows = [
        [
            Cell.of(point.structure),
            Cell.of(point.kind),
            Cell.of(point.group.run.model.width),
            Cell.of(point.group.result.macs, ","),
            *exponent_cells(point.exponents),
            Cell.of(point.loss, ".4f"),
        ]
        for point in points
    ]
    return SortableTable(headings, rows, Markup("The {} models of the lowest loss.").format(len(rows)))
