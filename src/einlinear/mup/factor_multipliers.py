"""Learning rates and gradients of factors over those of a dense layer of the same size, from the pattern alone."""

import math
from collections.abc import Callable

from einlinear.structures import Structure
from einlinear.structures.initialization import lookup_fan_in, spectral_std
from einlinear.structures.structured_matrix import Factor


def adam_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rate of every factor for Adam and its variants, relative to a dense layer of this size."""
    return _multipliers(structure, lambda factor: structure.in_features / factor.fan_in)


def sgd_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for SGD, relative to a dense layer: those of Adam over the size of the gradient.

    The gradient of an output is as small as the layer has outputs, not as a factor has, and reaches a factor through
    the later ones of its term. Where their matrices have the spectral norm sqrt(fan_out / fan_in), it grows by
    fan_out / fan_in in each. An entry that a step uses n times sums n gradients, and grows by sqrt(n).
    """
    multipliers: list[float] = []
    for term in structure.terms:
        growth = [factor.fan_out / factor.fan_in for factor in term.factors]
        for i, factor in enumerate(term.factors):
            gradient = math.prod(growth[i + 1 :]) * math.sqrt(factor.macs / factor.params)
            rate = structure.in_features / factor.fan_in / gradient
            multipliers.append(rate / len(term.factors))
    return tuple(multipliers)


def muon_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for Muon, whose updates have spectral norm 1, relative to a dense layer."""
    aspect = structure.out_features / structure.in_features
    return _multipliers(structure, lambda factor: math.sqrt(factor.fan_out / factor.fan_in / aspect))


def muon_product_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for Muon of products: the two updates of a term move the matrix by spectral norm 1."""
    terms = structure.by_term(muon_multipliers(structure))
    return tuple(rate if len(rates) == 1 else 1 / len(rates) for _, rates in terms for rate in rates)


def soap_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for SOAP, whose updates have equal singular values of root mean square 1, see Muon."""
    size = max(structure.out_features, structure.in_features)
    largest = [max(factor.fan_out, factor.fan_in) for factor in structure.factors]
    return tuple(rate * math.sqrt(size / n) for rate, n in zip(muon_multipliers(structure), largest, strict=True))


def table_multipliers(structure: Structure) -> tuple[float, ...]:
    """Return the learning rates for Adam of the factors of an embedding, relative to a dense table.

    The entries of a row sum up as many products as `lookup_fan_in` says, which all move together.
    """
    ratios = [1 / fan_in for fan_in in lookup_fan_in(structure)]
    return tuple(ratio / len(part) for _, part in structure.by_term(ratios) for ratio in part)


def gradient_scales(structure: Structure) -> tuple[float, ...]:
    """Return the size of the gradient of every factor over that of a dense matrix, right after initialisation.

    For inputs and gradients of outputs without correlation: a factor sees the input through the factors before it, the
    gradient through those after it, and sums over all places where the step uses an entry.
    """
    scales = []
    for term in structure.terms:
        stds = [spectral_std(factor.fan_in, factor.fan_out) for factor in term.factors]
        # a term sees the input as the others do, but its own share of the variance
        share = len(structure.terms) ** (-(len(term.factors) - 1) / 2)
        forward = [std * math.sqrt(factor.fan_in) for factor, std in zip(term.factors, stds)]
        backward = [std * math.sqrt(factor.fan_out) for factor, std in zip(term.factors, stds)]
        for i, factor in enumerate(term.factors):
            uses = factor.macs / factor.params
            scales.append(share * math.prod(forward[:i]) * math.prod(backward[i + 1 :]) * math.sqrt(uses))
    return tuple(scales)


def _multipliers(structure: Structure, ratio: Callable[[Factor], float]) -> tuple[float, ...]:
    # the k factors of a term move it together: each learns at 1 / k (arXiv 2406.06248, section 3; SGD after 2011.14522)
    return tuple(ratio(factor) / len(term.factors) for term in structure.terms for factor in term.factors)
