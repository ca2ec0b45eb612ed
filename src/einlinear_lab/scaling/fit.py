"""The frontier and the scaling law of models trained with several seeds, and of resamples of these seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from einlinear_lab.scaling.frontier import Frontier, pareto_frontier
from einlinear_lab.scaling.intervals import (
    Interval,
    Quantity,
    Source,
    law_interval,
    percentile_interval,
    prediction_interval,
)
from einlinear_lab.scaling.laws import MIN_POINTS_WITH_FLOOR, Array, PowerLaw, power_law, power_law_with_floor

# any two points lie on a law
MIN_FRONTIER = 3


@dataclass(frozen=True, eq=False)
class LossCurves:
    """The loss curves of one model trained with several seeds.

    Attributes:
        compute: compute of every measurement, (points,); a single point where only the final loss counts.
        losses: (seeds, points).
    """

    compute: Array
    losses: Array


@dataclass(frozen=True)
class Prediction:
    """The loss that a law predicts for a compute.

    Attributes:
        compute, loss: the prediction.
        interval: confidence interval of the law, without the scatter of a single run; None if unknown.
    """

    compute: float
    loss: float
    interval: Interval | None


@dataclass(frozen=True, eq=False)
class Draw:
    """The frontier and the law of one resample of the seeds."""

    frontier: Frontier
    law: PowerLaw


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """The frontier of several models, and the law through it.

    Attributes:
        frontier: frontier of the losses averaged over seeds. Its index counts the points of all curves in order.
        curve: index of the curve of each point of the frontier, (points,).
        law: power law through the frontier.
        draws: frontier and law of every resample of the seeds with enough points for a law; empty where a model has a
            single seed.
    """

    frontier: Frontier
    curve: NDArray[np.intp]
    law: PowerLaw
    draws: tuple[Draw, ...]

    def interval(self, quantity: Quantity, source: Source = "seeds", level: float = 0.95) -> Interval | None:
        """Return the confidence interval of a parameter of the law; None without resamples or degrees of freedom.

        Args:
            quantity: "exponent", "scale" or "floor".
            source: "seeds": percentiles over the resamples. "regression": from the scatter of the frontier around the
                law, as if its points were independent.
            level: confidence level.
        """
        if source == "regression":
            return law_interval(self.law, self.frontier.compute, self.frontier.loss, quantity, level)
        return self.seeds_interval(lambda draw: float(getattr(draw.law, quantity)), level)

    def predict(self, compute: float, source: Source = "seeds", level: float = 0.95) -> Prediction:
        """Predict the loss at a compute, also outside the range of the points, with its interval."""
        if source == "regression":
            interval = prediction_interval(self.law, self.frontier.compute, self.frontier.loss, compute, level)
        else:
            interval = self.seeds_interval(lambda draw: draw.law(compute), level)
        return Prediction(compute, self.law(compute), interval)

    def seeds_interval(self, number: Callable[[Draw], float], level: float = 0.95) -> Interval | None:
        """Return the percentile interval of any function of a resample."""
        numbers = [number(draw) for draw in self.draws]
        return percentile_interval(numbers, numbers, level) if numbers else None


def fit_scaling(
    curves: Sequence[LossCurves],
    *,
    floor: float | None = 0.0,
    tolerance: float = 0.02,
    window: tuple[float, float] = (0.0, math.inf),
    prune: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> ScalingFit:
    """Fit the frontier of the models of one structure and the law through it, for all seeds and for resamples of them.

    Losses are averaged over seeds before the frontier is taken: the lowest of several seeds would fall with their
    number. A resample draws, for every model separately, one seed less than there are, with replacement: then the
    variance over resamples is that of the mean over seeds, also with few seeds (Rao and Wu, "Resampling inference with
    complex survey data", 1988). Percentiles ignore the uncertainty of a variance from few seeds: 95 % intervals contain
    the true exponent in about 90 % of cases with three seeds, in 80 % with two. A model with a single seed allows no
    resamples.

    >>> compute = 10.0 ** np.arange(4, 9)
    >>> seeds = np.array([[0.98], [1.01], [1.01]])
    >>> fit = fit_scaling([LossCurves(c[None], 3 * c**-0.1 * seeds) for c in compute])
    >>> print(f"{fit.law.exponent:.2f}:", fit.interval("exponent"))
    0.10: 0.097 to 0.103 (95 %, seeds)

    Args:
        curves: loss curves, one for every model.
        floor: assumed irreducible loss; None fits it.
        tolerance, window, prune: rules of the frontier, see `pareto_frontier`.
        resamples: number of resamples.
        seed: random seed of the resamples.

    Raises:
        ValueError: a curve has the wrong shape, a point has no logarithm, or the frontier has too few points for a law.
    """
    for i, curve in enumerate(curves):
        if curve.compute.ndim != 1 or curve.losses.shape[1:] != curve.compute.shape or not len(curve.losses):
            raise ValueError(
                f"curve {i} has compute of shape {curve.compute.shape} and losses of shape {curve.losses.shape}: "
                "compute must be (points,) and losses (seeds, points), of at least one seed"
            )
    if not curves:
        raise ValueError(f"a law needs at least {MIN_FRONTIER} points on the frontier, but there are no models")
    compute = np.concatenate([curve.compute for curve in curves])

    def frontier(losses: Sequence[Array]) -> Frontier:
        mean = np.concatenate([seeds.mean(0) for seeds in losses])
        return pareto_frontier(compute, mean, floor=floor or 0.0, tolerance=tolerance, window=window, prune=prune)

    def fit(frontier: Frontier, near: float | None = None) -> PowerLaw:
        x, y = frontier.compute, frontier.loss
        return power_law_with_floor(x, y, near=near) if floor is None else power_law(x, y, floor=floor)

    enough = MIN_FRONTIER if floor is not None else MIN_POINTS_WITH_FLOOR
    best = frontier([curve.losses for curve in curves])
    if len(best.index) < enough:
        count = "there is 1" if len(best.index) == 1 else f"there are {len(best.index)}"
        wider = "" if window == (0.0, math.inf) else ", or widen the window"
        raise ValueError(
            f"a law needs at least {enough} points on the frontier, since any {enough - 1} lie on one, but {count}: "
            f"train models of more sizes{wider}"
        )
    law, rng = fit(best), np.random.default_rng(seed)
    counts = [len(curve.losses) for curve in curves]
    draws = []
    for _ in range(0 if 1 in counts else resamples):
        drawn = [rng.integers(count, size=count - 1) for count in counts]
        resample = frontier([curve.losses[seeds] for curve, seeds in zip(curves, drawn, strict=True)])
        if len(resample.index) >= enough:
            draws.append(Draw(resample, fit(resample, near=law.floor)))
    curve_of_point = np.repeat(np.arange(len(curves)), [len(curve.compute) for curve in curves])
    return ScalingFit(best, curve_of_point[best.index], law, tuple(draws))
