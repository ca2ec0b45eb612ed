"""Structure-aware muP as numbers: how a factor is initialised, and how fast it learns compared with dense.

Every factor is treated as the batch of dense matrices that its step multiplies with, of fan_in summed and fan_out
introduced features (Qiu et al., arXiv 2406.06248, section 3; the SGD rule after Yang and Hu, arXiv 2011.14522, that
for Muon after Yang et al., arXiv 2310.17813).

These are the rules for one structure: `nn.Linear` draws its factors by them, and `mup/rules.py` applies them to
whole models.
"""

from __future__ import annotations

import math

from einlinear.structures.structured_matrix import Structure


def spectral_std(fan_in: int, fan_out: int) -> float:
    """The standard deviation that gives a Gaussian matrix a spectral norm of one to two times sqrt(fan_out / fan_in).

    sqrt(min(fan_in, fan_out)) / fan_in: the spectral condition of Yang et al., arXiv 2310.17813.
    """
    return math.sqrt(min(fan_in, fan_out)) / fan_in


def init_std(structure: Structure) -> tuple[float, ...]:
    """The standard deviation of every factor's entries at initialisation, in the order of `structure.factors`.

    It is that of `spectral_std`, divided by sqrt(T) in a sum of T terms, which share the variance.

    >>> import einlinear as el
    >>> init_std(el.structure("btt", 256, 256))
    (0.25, 0.25)
    """
    terms = math.sqrt(len(structure.terms))
    return tuple(spectral_std(factor.fan_in, factor.fan_out) / terms for factor in structure.factors)


def adam_multipliers(structure: Structure) -> tuple[float, ...]:
    """The learning rate of every factor over that of a dense layer of the same size, for Adam and its kin.

    (in_features / fan_in) / k for each of the k factors of a term.

    >>> import einlinear as el
    >>> adam_multipliers(el.structure("btt(rank=2)", 256, 256))
    (8.0, 4.0)
    """
    return tuple(
        structure.in_features / factor.fan_in / len(term.factors) for term in structure.terms for factor in term.factors
    )


def sgd_multipliers(structure: Structure) -> tuple[float, ...]:
    """The learning rate of every factor over that of a dense layer of the same size, for SGD.

    (fan_out / fan_in) / (out_features / in_features) / k for each of the k factors of a term.
    """
    aspect = structure.out_features / structure.in_features
    return tuple(
        factor.fan_out / factor.fan_in / aspect / len(term.factors)
        for term in structure.terms
        for factor in term.factors
    )


def muon_multipliers(structure: Structure) -> tuple[float, ...]:
    """The learning rate of every factor over that of a dense layer of the same size, for Muon.

    sqrt((fan_out / fan_in) / (out_features / in_features)) / k for each of the k factors of a term: Muon's updates have
    a spectral norm of one, and the spectral condition asks for sqrt(fan_out / fan_in) of every matrix.
    """
    aspect = structure.out_features / structure.in_features
    return tuple(
        math.sqrt(factor.fan_out / factor.fan_in / aspect) / len(term.factors)
        for term in structure.terms
        for factor in term.factors
    )
