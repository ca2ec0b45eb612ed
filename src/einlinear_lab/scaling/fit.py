"""The frontier and the law of models trained with several seeds, and how much the seeds matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from einlinear_lab.scaling.laws import (
    MIN_POINTS_WITH_FLOOR,
    Array,
    PowerLaw,
    power_law,
    power_law_with_floor,
)

MIN_FRONTIER = 3  # any two points lie on a law


@dataclass(frozen=True, eq=False)
class LossCurves:
    """One model, trained with several seeds.

    Attributes:
        compute: where the loss was measured, (points,); a single one where only the final loss counts.
        losses: of every seed, (seeds, points).
    """

    compute: Array
    losses: Array


@dataclass(frozen=True)
class Prediction:
    """The loss that a law gives for a compute.

    Attributes:
        compute, loss: of the prediction.
        interval: of the law's loss there, without the scatter of a single run; None where there is none.
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
        frontier: of the models' losses, averaged over seeds. Its index counts the points of all curves, one after
            the other.
        curve: which of the given curves each point of the frontier is of, (points,).
        law: through the frontier.
        draws: the same for resamples of the seeds, but for those that leave too few points for a law; empty where a
            model has a single seed.
    """

    frontier: Frontier
    curve: NDArray[np.intp]
    law: PowerLaw
    draws: tuple[Draw, ...]

    def interval(self, quantity: Quantity, source: Source = "seeds", level: float = 0.95) -> Interval | None:
        """The interval of a number of the law; None where there are no resamples or no points to spare.

        Args:
            quantity: "exponent", "scale" or "floor".
            source: "seeds": percentiles of the resamples. "regression": from the scatter of the frontier around the
                law, as if its points were independent.
            level: of confidence.
        """
        if source == "regression":
            return law_interval(self.law, self.frontier.compute, self.frontier.loss, quantity, level)
        return self.seeds_interval(lambda draw: float(getattr(draw.law, quantity)), level)

    def predict(self, compute: float, source: Source = "seeds", level: float = 0.95) -> Prediction:
        """The law's loss at a compute, be it beyond all points, with its interval from either source."""
        if source == "regression":
            interval = prediction_interval(self.law, self.frontier.compute, self.frontier.loss, compute, level)
        else:
            interval = self.seeds_interval(lambda draw: draw.law(compute), level)
        return Prediction(compute, self.law(compute), interval)

    def seeds_interval(self, number: Callable[[Draw], float], level: float = 0.95) -> Interval | None:
        """The percentile interval of any number of a frontier and its law."""
        if not self.draws:
            return None
        numbers = [number(draw) for draw in self.draws]
        return percentile_interval(numbers, numbers, level)


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
    """The frontier of the models of one structure and the law through it, with what resampling the seeds makes of them.

    Losses are averaged over seeds before the frontier is taken: the lowest of several seeds would be the lower the more
    there are. A resample draws, for every model by itself, one seed less than there are, with replacement: then the
    variance over resamples is that of the mean over seeds, also with few of them (Rao and Wu, "Resampling inference
    with complex survey data", 1988). Percentiles still miss how uncertain a variance from so few is: intervals
    of 95 % hold the exponent in about 90 % of cases with three seeds, in 80 % with two. Where a model has a single seed
    there are no resamples.

    >>> compute = 10.0 ** np.arange(4, 9)
    >>> seeds = np.array([[0.98], [1.01], [1.01]])
    >>> fit = fit_scaling([LossCurves(c[None], 3 * c**-0.1 * seeds) for c in compute])
    >>> print(f"{fit.law.exponent:.2f}:", fit.interval("exponent"))
    0.10: 0.097 to 0.103 (95 %, seeds)

    Args:
        curves: one for every model.
        floor: assumed; or None, to fit it.
        tolerance, window, prune: of the frontier, see `pareto_frontier`.
        resamples: how many.
        seed: of the resamples, which are the same for the same seed.

    Raises:
        ValueError: curves of the wrong shape, points that have no logarithm, or too few on the frontier for a law.
    """
    for i, curve in enumerate(curves):
        if curve.compute.ndim != 1 or curve.losses.shape[1:] != curve.compute.shape or not len(curve.losses):
            raise ValueError(
                f"curve {i} has compute of shape {curve.compute.shape} and losses of shape {curve.losses.shape}: "
                f"compute is (points,) and losses (seeds, points), of at least one seed"
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
        there = "there is 1" if len(best.index) == 1 else f"there are {len(best.index)}"
        wider = "" if window == (0.0, math.inf) else ", or widen the window"
        raise ValueError(
            f"a law needs at least {enough} points on the frontier, since any {enough - 1} lie on one, but {there}: "
            f"train models of more sizes{wider}"
        )
    law = fit(best)
    single = any(len(curve.losses) == 1 for curve in curves)
    frontiers = [frontier(losses) for losses in _resamples(curves, 0 if single else resamples, seed)]
    draws = tuple(Draw(found, fit(found, near=law.floor)) for found in frontiers if len(found.index) >= enough)
    return ScalingFit(
        frontier=best,
        curve=np.repeat(np.arange(len(curves)), [len(curve.compute) for curve in curves])[best.index],
        law=law,
        draws=draws,
    )


def _resamples(curves: Sequence[LossCurves], count: int, seed: int) -> Iterator[list[Array]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield [curve.losses[rng.integers(len(curve.losses), size=len(curve.losses) - 1)] for curve in curves]
