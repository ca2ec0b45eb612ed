"""Structure-aware muP for one structure: initialisation scales and learning-rate multipliers of its factors.

Every factor is a batch of dense matrices with fan_in contracted and fan_out new features (Qiu et al., arXiv 2406.06248,
section 3). The rule for SGD is after Yang and Hu, arXiv 2011.14522.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from einlinear.structures.structured_matrix import Factor, Structure


def spectral_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation of a Gaussian matrix with spectral norm 1 to 2 times sqrt(fan_out / fan_in).

    The spectral condition of Yang et al., arXiv 2310.17813.
    """
    return math.sqrt(min(fan_in, fan_out)) / fan_in


def init_std(structure: Structure) -> tuple[float, ...]:
    """Return the standard deviation of every factor at initialisation, for terms that share the variance.

    >>> import einlinear as el
    >>> init_std(el.structure("btt", 256, 256))
    (0.25, 0.25)
    """
    terms = math.sqrt(len(structure.terms))
    return tuple(spectral_std(factor.fan_in, factor.fan_out) / terms for factor in structure.factors)


def adam_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rate of every factor relative to a dense layer of the same size, for Adam and its variants.

    >>> import einlinear as el
    >>> adam_multipliers(el.structure("btt(rank=2)", 256, 256))
    (8.0, 4.0)
    """
    return _multipliers(structure, lambda factor: structure.in_features / factor.fan_in)


def sgd_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for SGD, relative to a dense layer."""
    aspect = structure.out_features / structure.in_features
    return _multipliers(structure, lambda factor: factor.fan_out / factor.fan_in / aspect)


def muon_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for Muon, whose updates have spectral norm 1, relative to a dense layer."""
    aspect = structure.out_features / structure.in_features
    return _multipliers(structure, lambda factor: math.sqrt(factor.fan_out / factor.fan_in / aspect))


def _multipliers(structure: Structure, ratio: Callable[[Factor], float]) -> tuple[float, ...]:
    # the k factors of a term move it together, so each learns at 1 / k
    return tuple(ratio(factor) / len(term.factors) for term in structure.terms for factor in term.factors)
