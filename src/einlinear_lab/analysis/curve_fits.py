"""Fits of scaling laws to the curves of a comparison, one a structure; `scaling/fit.py` computes each fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from einlinear_lab import scaling
from einlinear_lab.analysis.columns import MISSING, Column
from einlinear_lab.analysis.comparison import (
    LENGTHS,
    Comparison,
    Curve,
    SeedGroup,
    dense_of,
    logged,
    make_curves,
    result_of,
)
from einlinear_lab.scaling.fit import check_rules

_RESAMPLES = 300
# a frontier of every model that no cheaper one beats, however far above the hull
_NO_HULL: Mapping[str, Any] = {"tolerance": 1e9}


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
    fits = _fit_all(curves, lambda group: evaluations(group, comparison.metric), floor, rules)
    if all(len(losses.compute) == 1 for fit in fits for losses in fit.losses):
        return None
    return ScalingLaws(comparison.metric, "MACs of training", floor, fits)


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


def law_columns(laws: ScalingLaws, digits: int = 3) -> list[Column]:
    """Return the numbers of the laws, a row for each curve; an assumed floor of zero has no column."""

    def column(heading: str, value: Callable[[scaling.ScalingFit], float], form: str) -> Column:
        values = [value(fit.fit) if fit.fit else math.nan for fit in laws.curves]
        return Column.of(heading, (value if math.isfinite(value) else None for value in values), form)

    intervals, multipliers = [fit.interval for fit in laws.curves], [fit.multiplier for fit in laws.curves]
    ends = [f"{at.low:.{digits}f} to {at.high:.{digits}f}, {at.source}" if at else MISSING for at in intervals]
    floor = column("floor", lambda fit: fit.law.floor, f".{digits}g")
    doubts = [fit.fit is not None and fit.fit.law.floor_identified is False for fit in laws.curves]
    texts = [f"{text} (not identified)" if doubt else text for text, doubt in zip(floor.texts, doubts, strict=True)]
    return [
        column("exponent", lambda fit: fit.law.exponent, f".{digits}f"),
        Column("95 % interval", [at.low if at else None for at in intervals], ends),
        column("R²", lambda fit: fit.law.r_squared, f".{digits}f"),
        column("scale", lambda fit: fit.law.scale, f".{digits}g"),
        *([replace(floor, texts=texts)] if laws.floor is None or laws.floor > 0 else []),
        Column.of("models", (len(fit.groups) if fit.fit else None for fit in laws.curves)),
        Column.of("points", (len(fit.fit.frontier.index) if fit.fit else None for fit in laws.curves)),
        Column(
            "compute multiplier",
            [at.multiplier.value if at else None for at in multipliers],
            [str(at or MISSING) for at in multipliers],
        ),
    ]


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
