"""The scaling laws of runs: every structure's losses over compute, as curves that `scaling` makes laws of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from einlinear_lab.findings.summary import LENGTHS, Curve, Row, Study, dense_of, make_curves, result
from einlinear_lab.runs.records import METRICS, Record
from einlinear_lab.scaling import (
    Interval,
    LossCurves,
    MultiplierAt,
    Prediction,
    ScalingFit,
    fit_scaling,
    multipliers_along,
)
from einlinear_lab.scaling.frontier import check_rules
from einlinear_lab.training import metrics

PER_INPUT, TRAINING = "MACs per {input}", "MACs of the training"  # forward passes only
_RESAMPLES = 300  # a second for a few structures
_ANY = 1e9  # tolerance of a frontier that holds every model that no cheaper one beats, however far above the hull
HULL = 0.02  # that of arXiv 2410.02117 for the points of training curves


@dataclass(frozen=True)
class Law:
    """One curve's losses over compute, and the law through the best of them.

    Attributes:
        curve: which.
        rows: its models, each at its best learning rate; those without a positive loss are left out.
        losses: of these, in the same order.
        fit: None where no law can be fitted.
        why: there is none.
        multipliers: along its frontier, against dense's; none where there is no dense.
    """

    curve: Curve
    rows: tuple[Row, ...]
    losses: tuple[LossCurves, ...]
    fit: ScalingFit | None
    why: str = ""
    multipliers: tuple[MultiplierAt, ...] = ()

    @property
    def interval(self) -> Interval | None:
        """The interval of the exponent: from the seeds where every model has several, else from the regression."""
        if self.fit is None:
            return None
        return self.fit.interval("exponent") or self.fit.interval("exponent", "regression")

    @property
    def multiplier(self) -> MultiplierAt | None:
        """The multiplier at the most compute at which dense's frontier tells it; a bound where it tells it nowhere."""
        exact = [along for along in self.multipliers if not along.multiplier.bound]
        return next(reversed(exact or self.multipliers), None)

    def predict(self, compute: float) -> Prediction | None:
        """The loss at a compute, with an interval of the same source."""
        if self.fit is None:
            return None
        return self.fit.predict(compute, "seeds" if self.fit.draws else "regression")


@dataclass(frozen=True)
class Laws:
    """The laws of one study for one measure.

    Attributes:
        measure: what is fitted.
        compute: what it is fitted over, in words.
        floor: that was assumed; None where it was fitted.
        laws: of the curves, in their order.
    """

    measure: str
    compute: str
    floor: float | None
    laws: tuple[Law, ...]


def laws_per_input(study: Study, measure: str, floor: float | None = 0.0) -> Laws:
    """The laws of final losses over the MACs of one input, with every model at its best learning rate.

    A law is fitted to all models of a curve that no cheaper one of them beats (arXiv 2406.06248 takes all).

    Args:
        study: the runs.
        measure: "train_loss", or the name of another.
        floor: the loss that no model gets below; None fits it.
    """
    laws = [_law(curve, lambda row: _final(row, measure), floor, _ANY) for curve in study.curves]
    return Laws(measure, PER_INPUT.format(input=study.input), floor, _against_dense(laws))


def laws_of_training(
    study: Study,
    floor: float | None = 0.0,
    *,
    tolerance: float = HULL,
    window: tuple[float, float] = (0.0, math.inf),
    prune: bool = False,
) -> Laws | None:
    """The laws of the error during training over the MACs so far; None where it was measured at the end only.

    MACs are those of all forward passes. A law is fitted to the points at the lower convex hull of all training
    curves. Runs of several lengths (`steps`) share it.

    Args:
        study, floor: as for `laws_per_input`.
        tolerance, window, prune: of the frontier, see `scaling.pareto_frontier`.

    Raises:
        ValueError: a tolerance or a window that no frontier can have.
    """
    check_rules(tolerance, window)
    curves = make_curves(study.records, apart_from=LENGTHS)
    laws = [_law(curve, lambda row: evaluations(row, study.error), floor, tolerance, window, prune) for curve in curves]
    if all(len(own.compute) == 1 for law in laws for own in law.losses):
        return None
    return Laws(study.error, TRAINING, floor, _against_dense(laws))


def evaluations(row: Row, measure: str) -> LossCurves:
    """What was measured during the training of one model, at those steps at which all of its seeds were measured."""
    own = [_measured(record, measure) for record in row.good]
    steps = sorted(set(own[0]).intersection(*own))
    losses = [[measured[step] for step in steps] for measured in own]
    compute = [_compute_at(row, step) for step in steps]
    return LossCurves(np.array(compute, dtype=float), np.array(losses, dtype=float))


def as_json(laws: Laws, at: Sequence[float] = ()) -> dict[str, Any]:
    """All numbers, as JSON values; NaN and infinities become None.

    Args:
        laws: of one study.
        at: computes to predict the loss for.
    """
    return {
        "measure": laws.measure,
        "compute": laws.compute,
        "assumed_floor": laws.floor,
        "structures": [_law_as_json(law, at) for law in laws.laws],
    }


def _compute_at(row: Row, step: int) -> float:
    """The MACs of all forward passes up to a step: with guides one costs more, before a model was made dense less."""
    own, dense_from, guided = row.result, row.run.training.densify_at, row.run.training.guide_until or 0
    final, guides = own.macs * own.inputs, own.guide_macs * own.inputs
    if dense_from is None or own.steps <= dense_from:
        return step * final + min(step, guided) * guides
    before = (own.compute - guided * guides - (own.steps - dense_from) * final) / dense_from
    return min(step, guided) * guides + min(step, dense_from) * before + max(step - dense_from, 0) * final


def _measured(record: Record, measure: str) -> dict[int, float]:
    """The measure by step; at the last one only where it was not measured during training."""
    lines = metrics.read(record.folder / METRICS)
    found = {line["step"]: line[measure] for line in lines if line.get(measure) is not None}
    return found or {result(record).steps: result(record).measures[measure]}


def _final(row: Row, measure: str) -> LossCurves:
    return LossCurves(np.array([row.result.macs], dtype=float), np.array(row.values(measure), dtype=float)[:, None])


def _law(
    curve: Curve,
    losses: Callable[[Row], LossCurves],
    floor: float | None,
    tolerance: float,
    window: tuple[float, float] = (0.0, math.inf),
    prune: bool = False,
) -> Law:
    """Fit a curve. What has no logarithm is left out: an error of zero, or one at an assumed floor."""
    found = [(row, _positive(losses(row), floor or 0.0)) for row in curve.best if row.good]
    found = [(row, own) for row, own in found if own.compute.size]
    rows, curves = tuple(row for row, _ in found), tuple(own for _, own in found)
    try:
        fit = fit_scaling(curves, floor=floor, tolerance=tolerance, window=window, prune=prune, resamples=_RESAMPLES)
    except ValueError as error:
        return Law(curve, rows, curves, None, str(error))
    return Law(curve, rows, curves, fit)


def _positive(curve: LossCurves, floor: float) -> LossCurves:
    good = (curve.losses > floor).all(0)
    return LossCurves(curve.compute[good], curve.losses[:, good])


def _against_dense(laws: Sequence[Law]) -> tuple[Law, ...]:
    fits = {law.curve.name: law.fit for law in laws}
    curves = [law.curve for law in laws]

    def compared(law: Law) -> Law:
        dense = dense_of(law.curve, curves)
        reference = fits[dense.name] if dense else None
        if law.fit is None or reference is None or dense is law.curve:
            return law
        return replace(law, multipliers=multipliers_along(law.fit, reference))

    return tuple(map(compared, laws))


def _law_as_json(law: Law, at: Sequence[float]) -> dict[str, Any]:
    content: dict[str, Any] = {"name": law.curve.name, "structure": law.curve.structure, "models": len(law.rows)}
    if law.fit is None:
        return content | {"no_law_because": law.why}
    numbers = law.fit.law
    predictions = [prediction for compute in at if (prediction := law.predict(compute))]
    return content | {
        "exponent": numbers.exponent,
        "exponent_interval": _interval_as_json(law.interval),
        "scale": numbers.scale,
        "floor": numbers.floor,
        "floor_identified": numbers.floor_identified,
        "r_squared": _finite(numbers.r_squared),
        "frontier": [[float(c), float(l)] for c, l in zip(law.fit.frontier.compute, law.fit.frontier.loss)],
        "compute_multipliers": [
            {
                "compute": along.compute,
                "loss": along.loss,
                "multiplier": along.multiplier.value,
                "bound": along.multiplier.bound,
                "interval": _interval_as_json(along.interval),
            }
            for along in law.multipliers
        ],
        "predictions": [
            {"compute": found.compute, "loss": found.loss, "interval": _interval_as_json(found.interval)}
            for found in predictions
        ],
    }


def _interval_as_json(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    ends = {"low": _finite(interval.low), "high": _finite(interval.high)}
    return {**ends, "level": interval.level, "source": interval.source}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
