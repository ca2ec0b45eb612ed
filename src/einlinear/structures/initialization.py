"""Standard deviations of factors at initialisation."""

import math

from einlinear.structures.structured_matrix import Structure


def spectral_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation that meets the spectral condition (Yang et al., arXiv 2310.17813)."""
    return math.sqrt(min(fan_in, fan_out)) / fan_in


def init_std(structure: Structure) -> tuple[float, ...]:
    """Return the standard deviation of every factor at initialisation. The terms share the variance."""
    terms = math.sqrt(len(structure.terms))
    return tuple(spectral_std(factor.fan_in, factor.fan_out) / terms for factor in structure.factors)
