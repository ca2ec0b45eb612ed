"""What follows from a term and its sizes alone: contraction order, MACs, exponents, generic rank.

A term is contracted factor by factor, from the input axes to the output axes. Its *state* after some of the
factors has the axes of the input and of these factors that are still needed. The cost of the next factor is the
product of all axes of the state and of the factor; an axis is summed with the last factor that carries it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import chain, count, pairwise, permutations

from einlinear.structures.pattern import Axes, TermPattern

_MAX_SUBSETS = 1024  # of factors, that are compared in all terms together

_MAX_NODES = 1500  # of the graphs whose maximum flow is a rank

Sizes = tuple[tuple[str, int], ...]  # of axes


def state(term: TermPattern, done: Iterable[int]) -> Axes:
    """The axes that are alive once these factors have been contracted: in the order in which they came."""
    done = tuple(done)
    needed = set(term.outputs)
    for index, axes in enumerate(term.factors):
        if index not in done:
            needed.update(axes)
    alive = dict.fromkeys(term.inputs)
    for index in done:
        alive.update(dict.fromkeys(term.factors[index]))
    return tuple(axis for axis in alive if axis in needed)


def exact_factors(terms: int) -> int:
    """How many factors a term may have for all their orders to be compared; with more, the written one is taken."""
    return max(0, (_MAX_SUBSETS // terms).bit_length() - 1)


@lru_cache(maxsize=4096)
def contraction_order(term: TermPattern, sizes: Sizes, exact: int) -> tuple[int, ...]:
    """The order of the factors with the fewest MACs, by dynamic programming over subsets; written order on a tie."""
    count = len(term.factors)
    if count > exact:
        return tuple(range(count))
    subsets = _Subsets(term, dict(sizes))
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for subset in range(1, 2**count):
        steps = []
        for last in range(count):
            if subset >> last & 1:
                before = subset ^ (1 << last)
                macs, order = best[before]
                steps.append((macs + subsets.step_macs(before, last), (*order, last)))
        best.append(min(steps))
    return best[-1][1]


class _Subsets:
    """The states after subsets of a term's factors. Sets are the bits of ints: all of them may be looked at."""

    def __init__(self, term: TermPattern, sizes: Mapping[str, int]) -> None:
        axes = tuple(dict.fromkeys(chain(term.inputs, *term.factors, term.outputs)))
        bits = {axis: 1 << i for i, axis in enumerate(axes)}
        self.factors = [sum(bits[axis] for axis in factor) for factor in term.factors]
        inputs, outputs = sum(bits[axis] for axis in term.inputs), sum(bits[axis] for axis in term.outputs)
        union = [0]  # of the axes of the factors in a subset
        for factor in self.factors:
            union += [axes | factor for axes in union]
        self.states = [(inputs | done) & (outputs | left) for done, left in zip(union, reversed(union))]
        self.products = {0: 1, **{bit: sizes[axis] for axis, bit in bits.items()}}

    def width(self, subset: int) -> int:
        """The size of the state."""
        return self._product(self.states[subset])

    def step_macs(self, before: int, last: int) -> int:
        """Multiply-accumulates of contracting a factor into a state."""
        state = self.states[before]
        return self._product(state) * self._product(self.factors[last] & ~state)

    def _product(self, axes: int) -> int:
        if axes not in self.products:
            one = axes & -axes
            self.products[axes] = self.products[one] * self._product(axes ^ one)
        return self.products[axes]


def step_macs(term: TermPattern, done: Iterable[int], factor: int, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates, for one input vector, of contracting the factor into the state."""
    return math.prod(sizes[axis] for axis in {*state(term, done), *term.factors[factor]})


def exponents(terms: Sequence[TermPattern], theta: Mapping[str, Fraction]) -> tuple[Fraction, Fraction, Fraction]:
    """psi, nu and omega of a sum of terms whose axes grow as features**theta (arXiv 2410.02117, section 3).

    rank = features**psi, MACs = features**(1 + nu), parameters / MACs = features**-omega, as the features grow. Like
    the paper's closed forms, they are those of the factors contracted in the order they are written in.
    """
    psi = macs = params = Fraction(0)
    for term in terms:
        order = range(len(term.factors))
        width = min(sum((theta[a] for a in state(term, order[:i])), Fraction(0)) for i in range(len(order) + 1))
        psi = max(psi, min(width, Fraction(1)))
        for i in order:
            macs = max(macs, sum((theta[a] for a in {*state(term, order[:i]), *term.factors[i]}), Fraction(0)))
            params = max(params, sum((theta[a] for a in term.factors[i]), Fraction(0)))
    return psi, macs - 1, macs - params


def generic_rank(terms: Sequence[TermPattern], sizes: Mapping[str, int], in_features: int, out_features: int) -> int:
    """The rank of the matrix for almost all values of the factors.

    A term's rank is the narrowest place on the way from the input to the output, over all orders of contraction
    (a minimum cut). Padding makes the ends ragged: then it is a maximum flow. A sum has the sum of its terms' ranks,
    at most min(in_features, out_features).

    With padding and four factors or more, the ends are taken for less ragged than they are where that would take long:
    the result is then an upper bound, off by less than the padding.
    """
    total, exact = 0, exact_factors(len(terms))
    for term in terms:
        size_in, size_out = (math.prod(sizes[a] for a in axes) for axes in (term.inputs, term.outputs))
        if (size_in, size_out) == (in_features, out_features):
            total += bottleneck(term, sizes, exact)
        else:
            total += _ragged_rank(term, sizes, in_features, out_features)
        if total >= min(in_features, out_features):
            break
    return min(total, in_features, out_features)


def bottleneck(term: TermPattern, sizes: Mapping[str, int], exact: int) -> int:
    """The narrowest state of a term, over all orders of contraction: its rank where nothing is padded."""
    count = len(term.factors)
    if count > exact:
        return min(math.prod(sizes[a] for a in state(term, range(n))) for n in range(count + 1))
    subsets = _Subsets(term, sizes)
    return min(map(subsets.width, range(2**count)))


@lru_cache(maxsize=4096)
def worth(term: TermPattern, sizes: Sizes, exact: int) -> tuple[int, int]:
    """The rank of a term, without padding, and its MACs, negative: of two ways to size it, the greater is better."""
    order = contraction_order(term, sizes, exact)
    size = dict(sizes)
    return bottleneck(term, size, exact), -sum(step_macs(term, order[:n], i, size) for n, i in enumerate(order))


def _ragged_rank(term: TermPattern, sizes: Mapping[str, int], in_features: int, out_features: int) -> int:
    """The least of the maximum flows through the states of all orders, or of the written order of many factors."""
    written = range(len(term.factors))
    orders = permutations(written) if len(written) <= 4 else [written]
    states = [[state(term, order[:n]) for n in range(len(written) + 1)] for order in orders]
    for digits in range(max(len(term.inputs), len(term.outputs)), -1, -1):
        ends = (_End(term.inputs, sizes, in_features, digits), _End(term.outputs, sizes, out_features, digits))
        pieces = {
            axis: list(pairwise(sorted({0, size}.union(*(end.cuts(axis) for end in ends)))))
            for axis, size in sizes.items()
        }
        nodes = sum(math.prod(len(pieces[axis]) for axis in axes) for path in states for axes in path)
        if nodes <= _MAX_NODES:
            break
    return min(_flow(path, pieces, ends) for path in states)


class _End:
    """Which values of the axes of the input, or of the output, are features and not padding: those up to the last.

    They are compared as numbers are, by leading digits. `digits` are looked at, and all values of the others let pass.
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

    def cuts(self, axis: str) -> set[int]:
        """Between which values of an axis there is a difference."""
        if axis not in self.axes:
            return set()
        place = self.axes.index(axis)
        digit = self.last[place]
        return {digit + 1} if place == len(self.axes) - 1 else {digit, digit + 1}

    def holds(self, node: Mapping[str, int]) -> bool:
        """Whether a piece of the axes, given by where it starts, consists of features."""
        return tuple(node[axis] for axis in self.axes) <= self.last


def _flow(states: Sequence[Axes], pieces: Mapping[str, Sequence[tuple[int, int]]], ends: tuple[_End, _End]) -> int:
    """The maximum flow through these states.

    Axes are cut where the digits of the last feature fall, so that all values within a piece are alike; a node is one
    piece of every axis of a state and lets through as much as it holds; nodes are joined where shared axes agree, by
    way of one more node for all that agree.
    """
    import networkx as nx  # comes with torch; only padded structures need it

    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    shared: list[str] = []
    names = count(1)
    for depth, axes in enumerate(states):
        cells: list[tuple[dict[str, int], int]] = [({}, 1)]
        for axis in axes:
            cells = [({**cell, axis: a}, size * (b - a)) for cell, size in cells for a, b in pieces[axis]]
        first, last = depth == 0, depth == len(states) - 1
        cells = [
            cell for cell in cells if (not first or ends[0].holds(cell[0])) and (not last or ends[1].holds(cell[0]))
        ]
        for cell, capacity in cells:
            name = next(names)
            graph.add_edge(name, -name, capacity=capacity)
            graph.add_edge("source" if first else (depth, *(cell[axis] for axis in shared)), name)
            after = [axis for axis in axes if not last and axis in states[depth + 1]]
            graph.add_edge(-name, "sink" if last else (depth + 1, *(cell[axis] for axis in after)))
        shared = after
    return int(nx.maximum_flow_value(graph, "source", "sink"))
