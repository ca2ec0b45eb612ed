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


def lookup_fan_in(structure: Structure) -> tuple[int, ...]:
    """Return how many products each factor sums up for one entry of a row, when rows are looked up.

    The indices of a row select entries. Then factors follow in reverse order, and sum over the axes that they alone
    introduced.
    """
    sizes = dict(structure.sizes)
    parts = [(term, factor) for term in structure.terms for factor in term.factors]
    return tuple(math.prod(sizes[axis] for axis in factor.new if axis not in term.outputs) for term, factor in parts)


def table_std(structure: Structure) -> tuple[float, ...]:
    """Return the standard deviations of factors with which the entries of a table have the root mean square 1."""
    sizes, stds = dict(structure.sizes), list[float]()
    for term, fan_ins in structure.by_term(lookup_fan_in(structure)):
        # of a row, only the entries at its own index of a shared axis are not zero
        shared = math.prod(sizes[axis] for axis in term.inputs if axis in term.outputs)
        share = (shared / len(structure.terms)) ** (0.5 / len(fan_ins))
        stds += [share / math.sqrt(fan_in) for fan_in in fan_ins]
    return tuple(stds)
