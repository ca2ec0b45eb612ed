"""The rank of a structured matrix for almost all values of its factors.

The rank of a term is a minimum cut: the smallest intermediate between input and output, over all orders of contraction.
Padding makes the ends ragged, since only some values of their axes are features. Then the rank is a maximum flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, pairwise, permutations

from einlinear.structures.contraction import contract, intermediates
from einlinear.structures.pattern import Axes, TermPattern

# nodes of the graphs whose maximum flow is a rank
_MAX_NODES = 1500
# factors up to which the flows of all orders are compared
_MAX_PERMUTED = 4


def generic_rank(terms: Sequence[TermPattern], sizes: Mapping[str, int], in_features: int, out_features: int) -> int:
    """The rank of the matrix for almost all values of the factors: at most the sum of the ranks of the terms.

    With padding and many axes, the ends are treated as less ragged than they are where the exact answer would take
    long. The result is then an upper bound, off by less than the padding.
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
    """The smallest maximum flow over all orders of contraction, or that of the written order of many factors."""
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
    """The maximum flow through the intermediates of one order of contraction.

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
