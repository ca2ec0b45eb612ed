"""A guess of the loss of a candidate from its exponents and sizes, with what it is worth.

A Gaussian process over psi, nu and omega, the width and the parameters, refitted as runs finish. How far it is to be
trusted is measured on runs that it was not fitted to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

AT_LEAST = 8  # runs, before anything is predicted
_FOLDS = 5


@dataclass(frozen=True)
class Trust:
    """How well losses are predicted of runs left out, five parts in turn.

    Attributes:
        rank: Spearman's correlation of predicted and true losses: 1 for the right order, 0 for none.
        r_squared: the share of the variance of log losses that is explained; below 0: worse than their mean.
        runs: how many there are.
    """

    rank: float
    r_squared: float
    runs: int

    def __str__(self) -> str:
        return f"rank correlation {self.rank:.2f}, R² {self.r_squared:.2f} on runs left out, of {self.runs}"


def foretold(early: float, pairs: Sequence[tuple[float, float]]) -> float:
    """The final loss of a run that ended early: a power of its early loss.

    Args:
        early: loss, positive.
        pairs: early and final losses of runs that were trained to the end.

    >>> round(foretold(9.0, [(1.0, 1.0), (4.0, 2.0), (16.0, 4.0)]), 6)  # final losses are roots of the early ones
    3.0
    """
    x, y = np.log(np.array(pairs, dtype=float)).T
    spread = float(((x - x.mean()) ** 2).mean())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).mean()) / spread) if spread > 0 else 0.0
    return math.exp(float(y.mean()) + slope * (math.log(early) - float(x.mean())))


class Predictor:
    """Fitted to runs.

    Args:
        features: (runs, features).
        losses: (runs,), positive and finite.

    Raises:
        ValueError: fewer than `AT_LEAST` runs.
    """

    def __init__(self, features: Sequence[Sequence[float]], losses: Sequence[float]) -> None:
        if len(losses) < AT_LEAST:
            raise ValueError(f"{len(losses)} runs are too few to predict from: at least {AT_LEAST}")
        x, y = np.array(features, dtype=float), np.log(np.array(losses, dtype=float))
        self._best = float(y.min())
        self._model = _fitted(x, y)
        self.trust = _trust(x, y)

    def predict(self, features: Sequence[Sequence[float]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The logarithm of the loss of each candidate, and its standard deviation."""
        mean, deviation = self._model.predict(np.array(features, dtype=float), return_std=True)
        return mean, deviation

    def improvement(self, features: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
        """How far, on average over what is possible, each candidate's log loss is below the best so far."""
        mean, deviation = self.predict(features)
        deviation = np.maximum(deviation, 1e-12)
        z = (self._best - mean) / deviation
        gain: np.ndarray[Any, Any] = deviation * (z * norm.cdf(z) + norm.pdf(z))
        return gain


def _fitted(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Any:
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern([1.0] * x.shape[1], (0.1, 1e3), nu=2.5) + WhiteKernel(
        0.1, (1e-4, 1.0)
    )
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    model = make_pipeline(StandardScaler(), process)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: a feature that tells nothing
        return model.fit(x, y)


def _trust(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Trust:
    predicted = np.empty_like(y)
    for kept, left_out in KFold(_FOLDS, shuffle=True, random_state=0).split(x):
        predicted[left_out] = _fitted(x[kept], y[kept]).predict(x[left_out])
    variance = float(((y - y.mean()) ** 2).mean())
    r_squared = 1 - float(((y - predicted) ** 2).mean()) / variance if variance > 0 else 0.0
    rank = float(spearmanr(predicted, y).statistic) if variance > 0 and np.ptp(predicted) > 0 else 0.0
    return Trust(rank, r_squared, len(y))
