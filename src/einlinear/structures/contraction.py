"""Contraction of a term: the order of the factors, the intermediates and the MACs.

A term is contracted factor by factor, from the input axes to the output axes. The intermediate after some factors has
the axes of the input and of these factors that the output or a later factor still needs. The MACs of a step are the
product of all axes of the intermediate and of the factor. An axis is contracted by the last factor that has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from einlinear.structures.pattern import Axes, TermPattern

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
def intermediate(term: TermPattern, done: tuple[int, ...]) -> Axes:
    """The axes of the intermediate after contraction of some factors, in the order in which they appeared."""
    left = (axes for index, axes in enumerate(term.factors) if index not in done)
    needed = set(term.outputs).union(*left)
    seen = dict.fromkeys(chain(term.inputs, *(term.factors[index] for index in done)))
    return tuple(axis for axis in seen if axis in needed)


@lru_cache(maxsize=4096)
def _contract(term: TermPattern, sizes: tuple[tuple[str, int], ...], max_subsets: int) -> Contraction:
    count, size = len(term.factors), dict(sizes)
    if 2**count > max_subsets:
        order = tuple(range(count))
        path = [intermediate(term, order[:n]) for n in range(count + 1)]
        macs = sum(math.prod(size[a] for a in {*path[n], *term.factors[n]}) for n in order)
        return Contraction(order, macs, min(math.prod(size[a] for a in axes) for axes in path))
    axes, factors = _subsets(term)
    products = {0: 1, **{1 << bit: size[axis] for bit, axis in enumerate(term.axes)}}

    def product(axes: int) -> int:
        if axes not in products:
            lowest = axes & -axes
            products[axes] = products[lowest] * product(axes ^ lowest)
        return products[axes]

    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for subset in range(1, 2**count):
        steps = []
        for last in range(count):
            if subset >> last & 1:
                before = subset ^ (1 << last)
                macs, order = best[before]
                steps.append((macs + product(axes[before] | factors[last]), (*order, last)))
        best.append(min(steps))
    macs, order = best[-1]
    return Contraction(order, macs, min(map(product, axes)))


@lru_cache(maxsize=1024)
def _subsets(term: TermPattern) -> tuple[list[int], list[int]]:
    """The axes of the intermediate after each subset of the factors, and of each factor.

    Sets of factors and of axes are bits of ints, since there may be many.
    """

    def bits(axes: Axes) -> int:
        return sum(1 << term.axes.index(axis) for axis in axes)

    factors = list(map(bits, term.factors))
    # the axes of the factors in each subset
    unions = [0]
    for factor in factors:
        unions += [union | factor for union in unions]
    inputs, outputs = bits(term.inputs), bits(term.outputs)
    return [(inputs | done) & (outputs | left) for done, left in zip(unions, reversed(unions))], factors
