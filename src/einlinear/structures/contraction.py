"""Contraction of a term: the order of the factors, the intermediates, the MACs and the exponents of all of these.

A term is contracted factor by factor, from the input axes to the output axes. The intermediate after some factors has
the axes of the input and of these factors that the output or a later factor still needs. The MACs of a step are the
product of all axes of the intermediate and of the factor. An axis is contracted by the last factor that has it.
Exponents are those of arXiv 2410.02117, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import chain
from operator import or_

from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.sizes import groups

# subsets of factors that are compared in all terms together
_MAX_SUBSETS = 1024


@dataclass(frozen=True)
class Contraction:
    """The cheapest contraction of a term at one size.

    Attributes:
        order: the positions of the factors in the pattern, first to last.
        macs: multiply-accumulates for one input vector.
        bottleneck: the size of the smallest intermediate over all orders, input and output included. Without padding it
            is the rank of the term.
    """

    order: tuple[int, ...]
    macs: int
    bottleneck: int


def contract(term: TermPattern, sizes: Mapping[str, int], terms: int) -> Contraction:
    """Find the order of contraction with the fewest MACs. On a tie, the written order is taken.

    All orders are compared unless the term has too many factors: then the written order is taken.

    Args:
        term: the term.
        sizes: the sizes of its axes, and perhaps of others.
        terms: the number of terms of the pattern, which share the work.
    """
    return _contract(term, tuple((axis, sizes[axis]) for axis in term.axes), _MAX_SUBSETS // terms)


@lru_cache(maxsize=4096)
def intermediates(term: TermPattern, order: tuple[int, ...]) -> tuple[Axes, ...]:
    """The axes of the input, of every intermediate and of the output, each in the order in which they appeared."""
    path = []
    for done in range(len(order) + 1):
        needed = set(term.outputs).union(*(term.factors[index] for index in order[done:]))
        seen = dict.fromkeys(chain(term.inputs, *(term.factors[index] for index in order[:done])))
        path.append(tuple(axis for axis in seen if axis in needed))
    return tuple(path)


@lru_cache(maxsize=4096)
def _contract(term: TermPattern, sizes: tuple[tuple[str, int], ...], max_subsets: int) -> Contraction:
    axes, factors = _subsets(term, max_subsets)
    products = {0: 1, **{1 << bit: size for bit, (_, size) in enumerate(sizes)}}

    def product(axes: int) -> int:
        if axes not in products:
            lowest = axes & -axes
            products[axes] = products[lowest] * product(axes ^ lowest)
        return products[axes]

    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for subset in list(axes)[1:]:
        steps = []
        for last, factor in enumerate(factors):
            before = subset & ~(1 << last)
            if before != subset and before in best:
                macs, order = best[before]
                steps.append((macs + product(axes[before] | factor), (*order, last)))
        best[subset] = min(steps)
    macs, order = best[max(best)]
    return Contraction(order, macs, min(map(product, axes.values())))


@lru_cache(maxsize=1024)
def _subsets(term: TermPattern, most: int) -> tuple[dict[int, int], list[int]]:
    """The axes of the intermediate after each subset of the factors, or of the first ones, and of each factor.

    Sets of factors and of axes are bits of ints, since there may be many.
    """

    def bits(axes: Axes) -> int:
        return sum(1 << term.axes.index(axis) for axis in axes)

    def union(subset: int) -> int:
        return reduce(or_, (factor for index, factor in enumerate(factors) if subset >> index & 1), 0)

    inputs, outputs, *factors = map(bits, (term.inputs, term.outputs, *term.factors))
    count = len(factors)
    subsets = range(2**count) if 2**count <= most else [2**n - 1 for n in range(count + 1)]
    return {done: (inputs | union(done)) & (outputs | union(~done)) for done in subsets}, factors


def scaling_exponents(
    pattern: Pattern, sizes: Mapping[str, int], in_features: int, out_features: int
) -> tuple[float, float, float]:
    """psi, nu and omega: rank = n^psi, MACs = n^(1 + nu) and parameters / MACs = n^-omega for n features.

    As in the paper's closed forms, the factors are contracted in the order they are written in.
    """
    theta = _axis_exponents(pattern, sizes, in_features, out_features)

    def total(axes: Iterable[str]) -> Fraction:
        return sum((theta[axis] for axis in axes), Fraction(0))

    psi = macs = params = Fraction(0)
    for term in pattern.terms:
        path = intermediates(term, tuple(range(len(term.factors))))
        psi = max(psi, min(Fraction(1), *map(total, path)))
        macs = max(macs, *(total({*axes, *factor}) for axes, factor in zip(path, term.factors)))
        params = max(params, *map(total, term.factors))
    return float(psi), float(macs - 1), float(macs - params)


def _axis_exponents(
    pattern: Pattern, sizes: Mapping[str, int], in_features: int, out_features: int
) -> dict[str, Fraction]:
    """The exponent of every axis: that of the pattern, else an equal share of what its group has left."""
    theta = {axis: size.exponent for axis, size in pattern.sizes}
    for group in groups(pattern, in_features, out_features):
        open_axes = [axis for axis in group.axes if axis not in theta]
        left = 1 - sum((theta[axis] for axis in group.axes if axis in theta), Fraction(0))
        theta.update({axis: left / len(open_axes) for axis in open_axes})
        if not open_axes and not any(theta[axis] for axis in group.axes) and group.features > 1:
            log = math.log(group.features)
            theta.update({axis: Fraction(math.log(sizes[axis]) / log) for axis in group.axes})
    return theta
