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
from itertools import combinations, permutations

from einlinear.structures.pattern import Axes, TermPattern

_MAX_ORDERED = 12  # factors; all subsets are compared up to here, beyond it the written order is taken


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


@lru_cache(maxsize=1024)
def contraction_order(term: TermPattern, sizes: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """The order of the factors with the fewest MACs, by dynamic programming over subsets; written order on a tie."""
    count = len(term.factors)
    if count > _MAX_ORDERED:
        return tuple(range(count))
    size = dict(sizes)
    best: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {frozenset(): (0, ())}
    for length in range(1, count + 1):
        for subset in map(frozenset, combinations(range(count), length)):
            best[subset] = min(
                (
                    best[subset - {last}][0] + step_macs(term, subset - {last}, last, size),
                    (*best[subset - {last}][1], last),
                )
                for last in subset
            )
    return best[frozenset(range(count))][1]


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
    """
    total = 0
    for term in terms:
        size_in, size_out = (math.prod(sizes[a] for a in axes) for axes in (term.inputs, term.outputs))
        if (size_in, size_out) == (in_features, out_features):
            total += bottleneck(term, sizes)
        else:
            count = len(term.factors)
            orders = permutations(range(count)) if count <= 4 else iter([tuple(range(count))])
            total += min(_ragged_rank(term, order, sizes, in_features, out_features) for order in orders)
    return min(total, in_features, out_features)


def bottleneck(term: TermPattern, sizes: Mapping[str, int]) -> int:
    """The narrowest state of a term, over all orders of contraction: its rank where nothing is padded."""
    factors = range(len(term.factors))
    if len(factors) <= _MAX_ORDERED:
        cuts = [subset for n in range(len(factors) + 1) for subset in combinations(factors, n)]
    else:
        cuts = [tuple(factors[:n]) for n in range(len(factors) + 1)]
    return min(math.prod(sizes[a] for a in state(term, cut)) for cut in cuts)


def _ragged_rank(
    term: TermPattern, order: tuple[int, ...], sizes: Mapping[str, int], in_features: int, out_features: int
) -> int:
    """The maximum flow through the states of one order when trailing inputs or outputs are absent.

    Axes are cut where the digits of the last feature fall, so that all values within a piece are alike; a node is one
    piece of every axis of a state and lets through as much as it holds; nodes are joined where shared axes agree.
    """
    import networkx as nx  # comes with torch; only padded structures need it

    last_in = _digits(in_features - 1, [sizes[a] for a in term.inputs])
    last_out = _digits(out_features - 1, [sizes[a] for a in term.outputs])
    cuts: dict[str, set[int]] = {axis: {0, size} for axis, size in sizes.items()}
    for axes, last in ((term.inputs, last_in), (term.outputs, last_out)):
        for axis, digit in zip(axes, last):
            cuts[axis].update((digit, digit + 1))
    pieces = {axis: list(zip(sorted(ends), sorted(ends)[1:])) for axis, ends in cuts.items()}

    states = [state(term, order[:n]) for n in range(len(order) + 1)]
    graph = nx.DiGraph()
    layers: list[list[dict[str, int]]] = []  # per state: axis -> where its piece starts
    for depth, axes in enumerate(states):
        nodes: list[tuple[dict[str, int], int]] = [({}, 1)]
        for axis in axes:
            nodes = [({**node, axis: a}, n * (b - a)) for node, n in nodes for a, b in pieces[axis]]
        if depth == 0:
            nodes = [(node, n) for node, n in nodes if tuple(node[a] for a in term.inputs) <= last_in]
        if depth == len(order):
            nodes = [(node, n) for node, n in nodes if tuple(node[a] for a in term.outputs) <= last_out]
        layers.append([node for node, _ in nodes])
        for index, (node, capacity) in enumerate(nodes):
            graph.add_edge((depth, index, "in"), (depth, index, "out"), capacity=capacity)
            if depth == 0:
                graph.add_edge("source", (depth, index, "in"))
            else:
                shared = set(states[depth - 1]) & set(axes)
                for before, other in enumerate(layers[depth - 1]):
                    if all(other[a] == node[a] for a in shared):
                        graph.add_edge((depth - 1, before, "out"), (depth, index, "in"))
            if depth == len(order):
                graph.add_edge((depth, index, "out"), "sink")
    return int(nx.maximum_flow_value(graph, "source", "sink"))


def _digits(index: int, radices: Sequence[int]) -> tuple[int, ...]:
    digits = []
    for radix in reversed(radices):
        index, digit = divmod(index, radix)
        digits.append(digit)
    return tuple(reversed(digits))
