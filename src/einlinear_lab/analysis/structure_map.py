"""Structures at equal compute: their losses over the exponents psi, nu and omega, and the map of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from einlinear.structures import structure
from einlinear.structures.spec import is_family, parse_family
from einlinear_lab.analysis.columns import MISSING, Column
from einlinear_lab.analysis.comparison import Comparison, SeedGroup
from einlinear_lab.models.config import DENSE, ModelConfig
from einlinear_lab.scaling import Coefficient, ExponentRegression, regress_on_exponents

# structures at equal compute, and of a map
MIN_CURVES, MIN_STRUCTURES = 5, 8
# largest deviation of the MACs of a map's models from their median, as a share
TOLERANCE = 0.1
SIGNS = {"omega": "ω", "psi": "ψ", "nu": "ν"}

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


def map_columns(points: Sequence[MapPoint], title: str) -> list[Column]:
    """Return the models with their exponents and their losses, under the title of the metric."""
    return [
        Column.of("structure", (point.structure for point in points)),
        Column.of("kind", (point.kind for point in points)),
        Column.of("width", (point.group.run.model.width for point in points)),
        Column.of("MACs", (point.group.result.macs for point in points), ","),
        *exponent_columns([point.exponents for point in points]),
        Column.of(title, (point.loss for point in points), ".4f"),
    ]


def exponent_columns(exponents: Sequence[Exponents]) -> list[Column]:
    """Return a column for each exponent, under its sign."""
    return [Column.of(sign, (values[name] for values in exponents), ".3g") for name, sign in SIGNS.items()]


def coefficient_columns(regressions: Mapping[str, ExponentRegression | None]) -> list[Column]:
    """Return the coefficients and the intervals of regressions, by the title of the metric, a row for each exponent."""
    rows: list[tuple[str, Coefficient, float]] = []
    for title, regression in regressions.items():
        if regression:
            named = ((f"{sign}, {title}", getattr(regression, name)) for name, sign in SIGNS.items())
            rows += [(name, coefficient, regression.r_squared) for name, coefficient in named]
    intervals = [coefficient.interval for _, coefficient, _ in rows]
    ends = [f"{interval.low:+.3f} to {interval.high:+.3f}" if interval else MISSING for interval in intervals]
    return [
        Column.of("exponent", (name for name, *_ in rows)),
        # a coefficient without an interval is not identified
        Column.of("coefficient", (c.value if c.interval else None for _, c, _ in rows), "+.3f"),
        Column("95 % interval", [interval.low if interval else None for interval in intervals], ends),
        Column.of("R²", (r_squared if math.isfinite(r_squared) else None for *_, r_squared in rows), ".2f"),
    ]


def _exponents_of(model: ModelConfig) -> dict[str, float]:
    """Return the exponents of a model's structure by name; none if its family is not registered."""
    try:
        built = structure(model.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(built, name) for name in SIGNS}


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
