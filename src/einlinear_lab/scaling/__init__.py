"""Scaling laws as mathematics: arrays of compute and loss -> laws, multipliers and effects, each with its interval.

fit.py          start here: frontier and law of several models, and of resamples of their seeds
laws.py         loss = floor + scale * compute ** -exponent, fitted
frontier.py     the best loss for every compute: the Pareto frontier of many training runs
intervals.py    intervals of a law's numbers, and where they come from
multipliers.py  how much more compute dense needs for the same loss
effects.py      what psi, nu and omega do to the loss

Nothing here knows of files, structures or runs. Compute is in any unit: only exponents do not depend on it.
"""

from einlinear_lab.scaling.effects import Effect, ExponentEffects, exponent_effects
from einlinear_lab.scaling.fit import LossCurves, Prediction, ScalingFit, fit_scaling
from einlinear_lab.scaling.frontier import Frontier, pareto_frontier
from einlinear_lab.scaling.intervals import Interval
from einlinear_lab.scaling.laws import PowerLaw, power_law, power_law_with_floor
from einlinear_lab.scaling.multipliers import (
    Multiplier,
    MultiplierAt,
    Spread,
    compute_multiplier,
    multipliers_along,
    spread,
)

__all__ = [
    "Effect",
    "ExponentEffects",
    "Frontier",
    "Interval",
    "LossCurves",
    "Multiplier",
    "MultiplierAt",
    "PowerLaw",
    "Prediction",
    "ScalingFit",
    "Spread",
    "compute_multiplier",
    "exponent_effects",
    "fit_scaling",
    "multipliers_along",
    "pareto_frontier",
    "power_law",
    "power_law_with_floor",
    "spread",
]
