"""Contraction of terms, factor by factor: order of the factors, intermediates, MACs, exponents and generic rank.

The intermediate after some factors has the axes of the input and of these factors that the output or a later factor
still needs. The MACs of a step are the product of all axes of the intermediate and of the factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache, lru_cache, reduce
from itertools import chain, count, pairwise, permutations
from operator import or_
from typing import NamedTuple

from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.sizes import groups

# subsets of factors that are compared in all terms together
_MAX_SUBSETS = 1024
# nodes of the graphs whose maximum flow is a rank
_MAX_NODES = 1500
# factors up to which the flows of all orders are compared
_MAX_PERMUTED = 4


class Contraction(NamedTuple):
    """The cheapest contraction of a term at one size."""

    # positions of the factors in the pattern, first to last
    order: tuple[int, ...]
    # multiply-accumulates for one input vector
    macs: int
    # size of the smallest intermediate over all orders, input and output included: the rank without padding
    bottleneck: int


def contract(term: TermPattern, sizes: Mapping[str, int], terms: int) -> Contraction:
    """Find the order of contraction with the fewest MACs. On a tie, or with too many factors, it is the written order.

    `terms` is the number of terms of the pattern, which share the work.
    """
    return _contract(term, tuple(sizes[axis] for axis in term.axes), _MAX_SUBSETS // terms)


@lru_cache(maxsize=4096)
def intermediates(term: TermPattern, order: tuple[int, ...]) -> tuple[Axes, ...]:
    """Return the axes of the input, of every intermediate and of the output, each in order of first appearance."""
    path = []
    for done in range(len(order) + 1):
        needed = set(term.outputs).union(*(term.factors[index] for index in order[done:]))
        seen = dict.fromkeys(chain(term.inputs, *(term.factors[index] for index in order[:done])))
        path.append(tuple(axis for axis in seen if axis in needed))
    return tuple(path)


@lru_cache(maxsize=4096)
def _contract(term: TermPattern, sizes: tuple[int, ...], max_subsets: int) -> Contraction:
    axes, factors = _subsets(term, max_subsets)

    @cache
    def product(axes: int) -> int:
        lowest = axes & -axes
        return sizes[lowest.bit_length() - 1] * product(axes ^ lowest) if axes else 1

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
    """Return the axes of the intermediate after each subset of the factors, or of the first ones, and of each factor.

    Sets of factors and of axes are bits of ints, since there may be many.
    """

    def bits(axes: Axes) -> int:
        return sum(1 << term.axes.index(axis) for axis in axes)

    def union(subset: int) -> int:
        return reduce(or_, (factor for index, factor in enumerate(factors) if subset >> index & 1), 0)

    inputs, outputs, *factors = map(bits, (term.inputs, term.outputs, *term.factors))
    subsets = range(2 ** len(factors)) if 2 ** len(factors) <= most else [2**n - 1 for n in range(len(factors) + 1)]
    return {done: (inputs | union(done)) & (outputs | union(~done)) for done in subsets}, factors


def scaling_exponents(
    pattern: Pattern, sizes: Mapping[str, int], in_features: int, out_features: int
) -> tuple[float, float, float]:
    """Return psi, nu and omega of arXiv 2410.02117: rank = n^psi, MACs = n^(1 + nu), parameters / MACs = n^-omega.

    As in the paper's closed forms, the factors are contracted in the order they are written in.
    """
    theta = {axis: size.exponent for axis, size in pattern.sizes}
    for group in groups(pattern, in_features, out_features):
        # open axes share equally what their group has left
        open_axes = [axis for axis in group.axes if axis not in theta]
        left = 1 - sum((theta[axis] for axis in group.axes if axis in theta), Fraction(0))
        theta.update({axis: left / len(open_axes) for axis in open_axes})
        if not open_axes and not any(theta[axis] for axis in group.axes) and group.features > 1:
            log = math.log(group.features)
            theta.update({axis: Fraction(math.log(sizes[axis]) / log) for axis in group.axes})

    def total(axes: Iterable[str]) -> Fraction:
        return sum((theta[axis] for axis in axes), Fraction(0))

    psi = macs = params = Fraction(0)
    for term in pattern.terms:
        path = intermediates(term, tuple(range(len(term.factors))))
        psi = max(psi, min(Fraction(1), *map(total, path)))
        macs = max(macs, *(total({*axes, *factor}) for axes, factor in zip(path, term.factors)))
        params = max(params, *map(total, term.factors))
    return float(psi), float(macs - 1), float(macs - params)


def generic_rank(terms: Sequence[TermPattern], sizes: Mapping[str, int], in_features: int, out_features: int) -> int:
    """Return the rank for almost all values of the factors: at most the sum of the ranks of the terms.

    The rank of a term is a minimum cut: its smallest intermediate, over all orders of contraction. With padding only
    some values of the outer axes are features, and the rank is a maximum flow. Where that would take long, it is an
    upper bound, off by less than the padding.
    """
    full, rank = min(in_features, out_features), 0
    for term in terms:
        size_in, size_out = (math.prod(sizes[axis] for axis in axes) for axes in (term.inputs, term.outputs))
        if (size_in, size_out) == (in_features, out_features):
            rank += contract(term, sizes, len(terms)).bottleneck
        else:
            rank += _padded_rank(term, sizes, in_features, out_features)
        if rank >= full:
            return full
    return rank


def _padded_rank(term: TermPattern, sizes: Mapping[str, int], in_features: int, out_features: int) -> int:
    """Return the smallest maximum flow over all orders of contraction, or that of the written order of many factors."""
    written = tuple(range(len(term.factors)))
    orders = permutations(written) if len(written) <= _MAX_PERMUTED else [written]
    paths = [intermediates(term, order) for order in orders]
    for digits in range(max(len(term.inputs), len(term.outputs)), -1, -1):
        ends = (_End(term.inputs, sizes, in_features, digits), _End(term.outputs, sizes, out_features, digits))
        pieces = {
            axis: list(pairwise(sorted({0, size, *chain(*(end.cuts(axis) for end in ends))})))
            for axis, size in sizes.items()
        }
        nodes = sum(math.prod(len(pieces[axis]) for axis in axes) for path in paths for axes in path)
        if nodes <= _MAX_NODES:
            break
    return min(_maximum_flow(path, pieces, ends) for path in paths)


class _End:
    """The input or the output of a padded term: which values of its axes are features, and which are padding.

    Features are the values up to the last feature, compared as numbers are: leading digit first. Only some leading
    digits of the last feature are looked at; whatever the other digits are counts as a feature.
    """

    def __init__(self, axes: Axes, sizes: Mapping[str, int], features: int, digits: int) -> None:
        rest, last = features - 1, list[int]()
        for axis in reversed(axes):
            rest, digit = divmod(rest, sizes[axis])
            last.append(digit)
        last = last[::-1][:digits]
        while last and last[-1] == sizes[axes[len(last) - 1]] - 1:
            last.pop()
        self.axes, self.last = axes[: len(last)], tuple(last)

    def cuts(self, axis: str) -> Iterable[int]:
        """Return the cuts of an axis between which all values are alike."""
        if axis not in self.axes:
            return ()
        digit = self.last[self.axes.index(axis)]
        return (digit + 1,) if axis == self.axes[-1] else (digit, digit + 1)

    def has(self, start: Mapping[str, int]) -> bool:
        """Return whether a piece of every axis, starting at these values, is made of features."""
        return tuple(start[axis] for axis in self.axes) <= self.last


def _maximum_flow(
    path: Sequence[Axes], pieces: Mapping[str, Sequence[tuple[int, int]]], ends: tuple[_End, _End]
) -> int:
    """Return the maximum flow through the intermediates of one order of contraction.

    A node is one piece of every axis of an intermediate. Its capacity is the number of values it stands for. Nodes of
    consecutive intermediates are joined where they agree in their shared axes, through one more node.
    """
    # networkx comes with torch, and only padded structures need it
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    names = count(1)
    shared: list[str] = []
    for depth, axes in enumerate(path):
        nodes: list[tuple[dict[str, int], int]] = [({}, 1)]
        for axis in axes:
            nodes = [({**starts, axis: a}, size * (b - a)) for starts, size in nodes for a, b in pieces[axis]]
        first, last = depth == 0, depth == len(path) - 1
        shared_next = [axis for axis in axes if not last and axis in path[depth + 1]]
        for starts, capacity in nodes:
            if (first and not ends[0].has(starts)) or (last and not ends[1].has(starts)):
                continue
            name = next(names)
            graph.add_edge(name, -name, capacity=capacity)
            graph.add_edge("source" if first else (depth, *(starts[axis] for axis in shared)), name)
            graph.add_edge(-name, "sink" if last else (depth + 1, *(starts[axis] for axis in shared_next)))
        shared = shared_next
    return int(nx.maximum_flow_value(graph, "source", "sink"))
