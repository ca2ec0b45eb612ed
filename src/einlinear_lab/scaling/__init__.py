"""Scaling laws as mathematics: arrays of compute and loss, in any unit, give laws, multipliers and intervals."""

from einlinear_lab.scaling.compute_multipliers import (
    Multiplier,
    MultiplierAt,
    MultiplierOverSeeds,
    compute_multiplier,
    multiplier_over_seeds,
    multipliers_along,
)
from einlinear_lab.scaling.fit import Frontier, LossCurves, Prediction, ScalingFit, fit_scaling, pareto_frontier
from einlinear_lab.scaling.laws import Interval, PowerLaw, power_law, power_law_with_floor
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
