"""The Pareto frontier of training runs: the lowest loss for every compute, a lower convex hull in log-log space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull

from einlinear_lab.scaling.laws import Array, log_points

# in logarithms: points on one line belong to its hull
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points in the order of compute, each of less loss than the one before it.

    Attributes:
        index: positions among the points that the frontier was taken of, (points,).
        compute, loss: compute and loss of these points, (points,).
    """

    index: NDArray[np.intp]
    compute: Array
    loss: Array

    def loss_at(self, compute: ArrayLike) -> Array:
        """Return the lowest loss for at most this compute, on straight lines between points in log-log space.

        The loss is infinite before the first point and constant after the last one.
        """
        log_compute = np.log(np.asarray(compute, dtype=float))
        return np.asarray(np.exp(np.interp(log_compute, np.log(self.compute), np.log(self.loss), left=math.inf)))


def pareto_frontier(
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    floor: float = 0.0,
    tolerance: float = 0.02,
    window: tuple[float, float] = (0.0, math.inf),
    prune: bool = False,
) -> Frontier:
    """Return the points on the lower convex hull of (log compute, log(loss - floor)), or slightly above it.

    The rules are those of Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of
    Structured Matrices" (2410.02117), for the points of all training curves of one structure.

    >>> frontier = pareto_frontier([1, 10, 10, 100], [8.0, 4.0, 6.0, 2.0])
    >>> frontier.index.tolist(), frontier.loss.tolist()
    ([0, 1, 3], [8.0, 4.0, 2.0])

    Args:
        compute, loss: all points, both (points,), in any order.
        floor: assumed irreducible loss, subtracted from the loss.
        tolerance: largest relative excess of loss - floor over the hull.
        window: least and most compute of the frontier. The hull is taken of all points.
        prune: drop the point of most compute, one by one, as long as R² of a power law grows: such runs had not
            reached their frontier when training ended. At least three points remain.

    Raises:
        ValueError: a point has no logarithm, the tolerance is negative, or the window is empty.
    """
    check_rules(tolerance, window)
    x, y = log_points(compute, loss, floor)
    hull = _lower_hull(x, y)
    near = np.flatnonzero(y <= np.interp(x, x[hull], y[hull]) + math.log1p(tolerance) + ROUNDING)
    order = near[np.lexsort((y[near], x[near]))]
    best_before = np.minimum.accumulate(np.concatenate([[math.inf], y[order][:-1]]))
    index = order[y[order] < best_before]
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    index = index[(window[0] <= compute[index]) & (compute[index] <= window[1])]
    while prune and len(index) > 3 and _r_squared(x, y, index[:-1]) > _r_squared(x, y, index):
        index = index[:-1]
    return Frontier(index, compute[index], loss[index])


def check_rules(tolerance: float, window: tuple[float, float]) -> None:
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
