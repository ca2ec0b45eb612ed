"""Scaling laws as mathematics: arrays of compute and loss give laws, compute multipliers and confidence intervals.

fit.py          start here: the frontier and the law of several models, with resampled seeds
laws.py         loss = floor + scale * compute ** -exponent
frontier.py     the Pareto frontier of many training runs: the lowest loss for every compute
intervals.py    confidence intervals, from seeds or from regression
multipliers.py  compute multipliers: how many times the compute dense needs for the same loss
regression.py   the loss against the structure exponents psi, nu and omega

Nothing in this folder depends on files, structures or runs. Compute may have any unit: exponents do not depend on it.
"""

from einlinear_lab.scaling.fit import LossCurves, Prediction, ScalingFit, fit_scaling
from einlinear_lab.scaling.frontier import Frontier, pareto_frontier
from einlinear_lab.scaling.intervals import Interval
from einlinear_lab.scaling.laws import PowerLaw, power_law, power_law_with_floor
from einlinear_lab.scaling.multipliers import (
    Multiplier,
    MultiplierAt,
    MultiplierOverSeeds,
    compute_multiplier,
    multiplier_over_seeds,
    multipliers_along,
)
from einlinear_lab.scaling.regression import Coefficient, ExponentRegression, regress_on_exponents

__all__ = [
    "Coefficient",
    "ExponentRegression",
    "Frontier",
    "Interval",
    "LossCurves",
    "Multiplier",
    "MultiplierAt",
    "MultiplierOverSeeds",
    "PowerLaw",
    "Prediction",
    "ScalingFit",
    "compute_multiplier",
    "fit_scaling",
    "multiplier_over_seeds",
    "multipliers_along",
    "pareto_frontier",
    "power_law",
    "power_law_with_floor",
    "regress_on_exponents",
]
