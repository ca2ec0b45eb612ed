"""Contraction of terms, factor by factor: order of the factors, intermediates, MACs, exponents and generic rank."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache, lru_cache, reduce
from itertools import chain, pairwise, permutations
from operator import or_
from typing import NamedTuple

from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.sizes import groups


class Contraction(NamedTuple):
    """The cheapest contraction of a term: order of its factors, MACs, and smallest intermediate over all orders."""

    order: tuple[int, ...]
    macs: int
    bottleneck: int


def contract(term: TermPattern, sizes: Mapping[str, int], terms: int) -> Contraction:
    """Find the order of the fewest MACs: the written one on a tie, or if the factors of all `terms` are too many."""
    # all terms together compare at most 1024 subsets of factors
    return _contract(term, tuple(sizes[axis] for axis in term.axes), 1024 // terms)


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
    # sets of axes and of factors are bits of ints, since there may be many
    bits = {axis: 1 << bit for bit, axis in enumerate(term.axes)}
    inputs, outputs, *factors = (sum(bits[a] for a in axes) for axes in (term.inputs, term.outputs, *term.factors))
    count = len(factors)
    subsets = range(2**count) if 2**count <= max_subsets else [2**n - 1 for n in range(count + 1)]

    def union(subset: int) -> int:
        return reduce(or_, (factor for index, factor in enumerate(factors) if subset >> index & 1), 0)

    @cache
    def product(axes: int) -> int:
        return math.prod(size for bit, size in enumerate(sizes) if axes >> bit & 1)

    # of the intermediate after each subset of the factors
    axes = {done: (inputs | union(done)) & (outputs | union(2**count - 1 - done)) for done in subsets}
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for subset in subsets[1:]:
        steps = []
        for last, factor in enumerate(factors):
            before = subset ^ 1 << last
            if before in best:
                macs, order = best[before]
                steps.append((macs + product(axes[before] | factor), (*order, last)))
        best[subset] = min(steps)
    macs, order = best[max(best)]
    return Contraction(order, macs, min(map(product, axes.values())))


def sharding_axis(terms: Sequence[TermPattern], side: str) -> str | None:
    """Return the slowest axis of a side, "in" or "out", that all terms split alike, or None (`Structure.sharding`)."""
    sides = [term.inputs if side == "in" else term.outputs for term in terms]

    def splits(term: TermPattern, group: Axes, axis: str) -> bool:
        return axis in group and all(axis in factor for factor in term.factors if not {*group}.isdisjoint(factor))

    for axis in sides[0]:
        is_split = all(splits(term, group, axis) for term, group in zip(terms, sides))
        # terms split the same features if the same axes are faster
        if is_split and len({frozenset(group[group.index(axis) :]) for group in sides}) == 1:
            return axis
    return None


def scaling_exponents(pattern: Pattern, sizes: Mapping[str, int], n_in: int, n_out: int) -> tuple[float, ...]:
    """Return psi, nu and omega of arXiv 2410.02117, whose closed forms take the factors in the written order."""
    theta = {axis: size.exponent for axis, size in pattern.sizes}
    for group in groups(pattern, n_in, n_out):
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
    """Return the rank for almost all values of the factors: of minimum cuts, which padding turns into maximum flows."""
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
    orders = permutations(written) if len(written) <= 4 else [written]
    paths = [intermediates(term, order) for order in orders]
    sides = ((term.inputs, in_features), (term.outputs, out_features))
    for digits in range(max(len(term.inputs), len(term.outputs)), -1, -1):
        ends = [_last_feature(axes, sizes, features, digits) for axes, features in sides]
        pieces = {}
        for axis, size in sizes.items():
            cuts = {0, size}
            for last in ends:
                if axis in last:
                    cuts |= {last[axis] + 1} if axis == [*last][-1] else {last[axis], last[axis] + 1}
            pieces[axis] = list(pairwise(sorted(cuts)))
        nodes = sum(math.prod(len(pieces[axis]) for axis in axes) for path in paths for axes in path)
        if nodes <= 1500:
            break
    return min(_maximum_flow(path, pieces, ends) for path in paths)


def _last_feature(axes: Axes, sizes: Mapping[str, int], features: int, digits: int) -> dict[str, int]:
    """Return up to `digits` leading digits of the last feature, by axis: all values up to it are features."""
    rest, last = features - 1, list[int]()
    for axis in reversed(axes):
        rest, digit = divmod(rest, sizes[axis])
        last.append(digit)
    last = last[::-1][:digits]
    while last and last[-1] == sizes[axes[len(last) - 1]] - 1:
        last.pop()
    return dict(zip(axes, last))


def _maximum_flow(path: tuple[Axes, ...], pieces: dict[str, list[tuple[int, int]]], ends: list[dict[str, int]]) -> int:
    """Return the maximum flow through the intermediates of one order: a node is one piece of every axis."""
    # networkx comes with torch, and only padded structures need it
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    shared: list[str] = []
    for depth, axes in enumerate(path):
        nodes: list[tuple[dict[str, int], int]] = [({}, 1)]
        for axis in axes:
            nodes = [({**starts, axis: a}, size * (b - a)) for starts, size in nodes for a, b in pieces[axis]]
        first, last = depth == 0, depth == len(path) - 1
        shared_next = [axis for axis in axes if not last and axis in path[depth + 1]]
        end = ends[0] if first else ends[1] if last else {}
        for starts, capacity in nodes:
            if [starts[axis] for axis in end] > [*end.values()]:
                continue
            name = len(graph)
            graph.add_edge(name, -name, capacity=capacity)
            # nodes of consecutive intermediates are joined where they agree in their shared axes, through one more node
            graph.add_edge("source" if first else (depth, *(starts[axis] for axis in shared)), name)
            graph.add_edge(-name, "sink" if last else (depth + 1, *(starts[axis] for axis in shared_next)))
        shared = shared_next
    return int(nx.maximum_flow_value(graph, "source", "sink"))
