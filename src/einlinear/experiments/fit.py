"""Scaling curves given as pairs of MACs and loss: what `scaling` offers for arrays."""

from __future__ import annotations

from collections.abc import Sequence

from einlinear.experiments.scaling.laws import PowerLaw, power_law
from einlinear.experiments.scaling.multipliers import Multiplier, Point, Spread, compute_multiplier, spread

__all__ = ["Multiplier", "Point", "PowerLaw", "Spread", "compute_multiplier", "fit_power_law", "spread"]


def fit_power_law(points: Sequence[Point]) -> PowerLaw | None:
    """The least-squares line through log loss over log MACs; None where all points have the same MACs, or none exist.

    >>> law = fit_power_law([(100, 0.4), (400, 0.2)])
    >>> round(law.exponent, 6), round(law(1600), 6)
    (0.5, 0.1)
    """
    if len({macs for macs, _ in points}) < 2:
        return None
    macs, losses = zip(*points)
    return power_law(macs, losses)
