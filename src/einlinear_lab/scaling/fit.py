"""The Pareto frontier and the scaling law of models trained with several seeds, and of resamples of these seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull

from einlinear_lab.scaling import laws
from einlinear_lab.scaling.laws import Array, Interval, PowerLaw, Quantity, Source, power_law, power_law_with_floor

# any two points lie on a law
MIN_FRONTIER = 3
# in logarithms: points on one line belong to its hull
ROUNDING = 1e-9
_EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True, eq=False)
class LossCurves:
    """Losses (seeds, points) of one model over its compute (points,): a single point for final losses."""

    compute: Array
    losses: Array


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points in the order of compute, each of less loss than the one before; index is their place among all points."""

    index: NDArray[np.intp]
    compute: Array
    loss: Array

    def loss_at(self, compute: ArrayLike) -> Array:
        """Return the lowest loss for this compute, on lines in log-log space; infinite before the first point."""
        log_compute = np.log(np.asarray(compute, dtype=float))
        return np.asarray(np.exp(np.interp(log_compute, np.log(self.compute), np.log(self.loss), left=math.inf)))


@dataclass(frozen=True)
class Prediction:
    """The loss that a law predicts for a compute, with the confidence interval of the law (None if unknown)."""

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
        draws: resamples of the seeds with enough points for a law; empty where a model has a single seed.
    """

    frontier: Frontier
    curve: NDArray[np.intp]
    law: PowerLaw
    draws: tuple[Draw, ...]

    def interval(self, quantity: Quantity, source: Source = "seeds", level: float = 0.95) -> Interval | None:
        """Return the interval of "exponent", "scale" or "floor"; None without resamples or degrees of freedom.

        It is by percentiles over the resampled "seeds", or by "regression", as if points were independent.
        """
        if source == "regression":
            return laws.law_interval(self.law, self.frontier.compute, self.frontier.loss, quantity, level)
        return self.seeds_interval(lambda draw: float(getattr(draw.law, quantity)), level)

    def predict(self, compute: float, source: Source = "seeds", level: float = 0.95) -> Prediction:
        """Predict the loss at a compute, also outside the range of the points, without the scatter of a single run."""
        if source == "regression":
            interval = laws.prediction_interval(self.law, self.frontier.compute, self.frontier.loss, compute, level)
        else:
            interval = self.seeds_interval(lambda draw: draw.law(compute), level)
        return Prediction(compute, self.law(compute), interval)

    def seeds_interval(self, number: Callable[[Draw], float], level: float = 0.95) -> Interval | None:
        """Return the percentile interval of any function of a resample."""
        numbers = [number(draw) for draw in self.draws]
        return laws.percentile_interval(numbers, numbers, level) if numbers else None


def fit_scaling(
    curves: Sequence[LossCurves],
    *,
    floor: float | None = 0.0,
    tolerance: float = 0.02,
    window: tuple[float, float] = _EVERYWHERE,
    prune: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> ScalingFit:
    """Fit the frontier of the models of one structure and the law through it, for all seeds and for resamples of them.

    Losses are averaged over seeds before the frontier is taken: the lowest of several seeds would fall with their
    number. A resample draws for every model one seed less than there are, with replacement, so that its variance is
    that of the mean over seeds (Rao and Wu, "Resampling inference with complex survey data", 1988). 95 % intervals
    contain the true exponent in about 90 % of cases with three seeds, in 80 % with two.

    >>> compute = 10.0 ** np.arange(4, 9)
    >>> seeds = np.array([[0.98], [1.01], [1.01]])
    >>> fit = fit_scaling([LossCurves(c[None], 3 * c**-0.1 * seeds) for c in compute])
    >>> print(f"{fit.law.exponent:.2f}:", fit.interval("exponent"))
    0.10: 0.097 to 0.103 (95 %, seeds)

    Args:
        floor: assumed irreducible loss; None fits it.
        tolerance, window, prune: rules of the frontier, see `pareto_frontier`.
        resamples, seed: number and random seed of the resamples; none are drawn where a model has a single seed.

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

    enough = MIN_FRONTIER if floor is not None else laws.MIN_POINTS_WITH_FLOOR
    best = frontier([curve.losses for curve in curves])
    if (found := len(best.index)) < enough:
        wider = "" if window == _EVERYWHERE else ", or widen the window"
        raise ValueError(
            f"a law needs at least {enough} points on the frontier, since any {enough - 1} lie on one, but there "
            f"{'is' if found == 1 else 'are'} {found}: train models of more sizes{wider}"
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


def pareto_frontier(
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    floor: float = 0.0,
    tolerance: float = 0.02,
    window: tuple[float, float] = _EVERYWHERE,
    prune: bool = False,
) -> Frontier:
    """Return the points on the lower convex hull of (log compute, log(loss - floor)), or slightly above it.

    The rules are those of Potapczynski et al. (arXiv 2410.02117), for all training curves of one structure.

    >>> frontier = pareto_frontier([1, 10, 10, 100], [8.0, 4.0, 6.0, 2.0])
    >>> frontier.index.tolist(), frontier.loss.tolist()
    ([0, 1, 3], [8.0, 4.0, 2.0])

    Args:
        compute, loss: all points, both (points,), in any order.
        floor: assumed irreducible loss, subtracted from the loss.
        tolerance: largest relative excess of loss - floor over the hull.
        window: least and most compute of the frontier. The hull is taken of all points.
        prune: drop points of most compute (of unfinished runs) as long as R² of a power law grows and three remain.

    Raises:
        ValueError: a point has no logarithm, the tolerance is negative, or the window is empty.
    """
    check_rules(tolerance, window)
    x, y = laws.log_points(compute, loss, floor)
    hull = _lower_hull(x, y)
    near = np.flatnonzero(y <= np.interp(x, x[hull], y[hull]) + math.log1p(tolerance) + ROUNDING)
    order = near[np.lexsort((y[near], x[near]))]
    best_before = np.minimum.accumulate(np.concatenate([[math.inf], y[order][:-1]]))
    index = order[y[order] < best_before]
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    index = index[(window[0] <= compute[index]) & (compute[index] <= window[1])]
    while prune and len(index) > MIN_FRONTIER and _r_squared(x, y, index[:-1]) > _r_squared(x, y, index):
        index = index[:-1]
    return Frontier(index, compute[index], loss[index])


def check_rules(tolerance: float = 0.0, window: tuple[float, float] = _EVERYWHERE, prune: bool = False) -> None:
    """Raise ValueError for a negative tolerance or an empty window."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is a share of the loss, such as 0.02 for 2 %, not {tolerance}")
    if not window[0] < window[1]:
        raise ValueError(f"window is from the least to the most compute, not from {window[0]:g} to {window[1]:g}")


def _lower_hull(x: Array, y: Array) -> NDArray[np.intp]:
    """Return the corners of the convex hull that face down, by x."""
    # the published rule has the second dummy; with the first above the point of least x the hull is never flat
    dummies = [(x.min(), y.max() + 1), (x.max() + 1, y.max() + 1)]
    corners = ConvexHull(np.concatenate([np.stack([x, y], axis=1), dummies])).vertices
    corners = corners[corners < len(x)]
    return np.asarray(corners[np.argsort(x[corners])])


def _r_squared(x: Array, y: Array, index: NDArray[np.intp]) -> float:
    return float(np.corrcoef(x[index], y[index])[0, 1]) ** 2
