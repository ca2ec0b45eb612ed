"""The best loss for every compute: the Pareto frontier of training runs, as a lower convex hull of logarithms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull

from einlinear_lab.scaling.laws import Array, log_points

ROUNDING = 1e-9  # of logarithms: points on one line belong to its hull


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points by compute, each of more compute and of less loss than the one before it.

    Attributes:
        index: which of the given points these are, (points,).
        compute, loss: of these points as they were given, (points,).
    """

    index: NDArray[np.intp]
    compute: Array
    loss: Array

    def loss_at(self, compute: ArrayLike) -> Array:
        """The lowest loss for at most this compute: on straight lines between the points in log-log space.

        It is infinite before the first point, and stays at the last point's loss after it.
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
    """The points that lie on the lower convex hull of (log compute, log(loss - floor)), or hardly above it.

    The rules are those of Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of
    Structured Matrices" (2410.02117), for the points of all training curves of one structure.

    >>> frontier = pareto_frontier([1, 10, 10, 100], [8.0, 4.0, 6.0, 2.0])
    >>> frontier.index.tolist(), frontier.loss.tolist()
    ([0, 1, 3], [8.0, 4.0, 2.0])

    Args:
        compute, loss: of every point, both (points,), in any order.
        floor: assumed; subtracted from the loss.
        tolerance: points belong to the frontier whose loss - floor is above the hull's by at most this share.
        window: the least and the most compute of points that are kept. The hull is that of all points.
        prune: drop the point of most compute, one by one, as long as a power law then explains more (its R² grows):
            runs that did not get to their frontier before training ended. Three points are always left.

    Raises:
        ValueError: points that have no logarithm, a negative tolerance, or an empty window.
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
    """Raise ValueError for a tolerance or a window that no frontier can have."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is a share of the loss, 0.02 for 2 %, not {tolerance}")
    if not window[0] < window[1]:
        raise ValueError(f"window is from the least to the most compute, not from {window[0]:g} to {window[1]:g}")


def _lower_hull(x: Array, y: Array) -> NDArray[np.intp]:
    """The corners of the convex hull that face down, by x.

    The published rule is a dummy point at (max + 1, max + 1). With another one above the point of least x, the rest of
    the hull are dummies, and the hull is never flat, whatever the points.
    """
    top = y.max() + 1
    dummies = [(x.min(), top), (x.max() + 1, top)]
    corners = ConvexHull(np.concatenate([np.stack([x, y], axis=1), dummies])).vertices
    corners = corners[corners < len(x)]
    return np.asarray(corners[np.argsort(x[corners])])


def _r_squared(x: Array, y: Array, index: NDArray[np.intp]) -> float:
    return float(np.corrcoef(x[index], y[index])[0, 1]) ** 2
