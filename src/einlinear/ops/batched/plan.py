"""The plan of the batched-matmul backend: which axes play which part, and how the states between lie in memory.

A step multiplies a factor (batch, rows, inner) with the state (batch, inner, columns), where the columns are the
tokens and whatever the factor does not touch. A group of axes that are neighbours in memory is one dimension of a
strided matrix product; where they are not, the state has to be copied first. The plan is the order of contraction and
the layouts, token-major or feature-major, with the least work: copies, then multiply-accumulates. A two-factor BTT
copies no activation at all; its intermediate is feature-major, tokens last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations

from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

TOKENS = ""  # the axis of the tokens; no axis of a pattern has this name
_MAX_ORDERED = 3  # factors; beyond that the order with the fewest MACs is the only candidate
_KEPT = 16  # layouts after every step
_COPY = 16  # MACs that take as long as copying an element does


@dataclass(frozen=True)
class Step:
    """One contraction.

    Attributes:
        index: of the factor in `Structure.factors`.
        factor: its axes.
        batch: axes of factor and state; or, where the factor has none of them, axes over which it is repeated.
        rows, inner, columns: as above.
        source, result: all axes of the state before and after, the slowest first.
        macs, copied: multiply-accumulates and copied elements for one token.
    """

    index: int
    factor: Axes
    batch: Axes
    rows: Axes
    inner: Axes
    columns: Axes
    source: Axes
    result: Axes
    macs: int
    copied: int

    @property
    def repeats(self) -> bool:
        """Whether the same matrix multiplies every batch entry."""
        return bool(self.batch) and self.batch[0] not in self.factor

    @cached_property
    def plain(self) -> bool:
        """Whether it is the product of a matrix with vectors that lie one after the other, as in `F.linear`."""
        ends = (TOKENS, *self.inner), (TOKENS, *self.rows), (*self.rows, *self.inner)
        return ends == (self.source, self.result, self.factor) and len(self.factor) == 2

    @property
    def cost(self) -> int:
        """Of one token, in MACs."""
        return self.macs + _COPY * self.copied

    def __str__(self) -> str:
        def text(axes: Axes) -> str:
            return " ".join(axis or "tokens" for axis in axes) or "1"

        parts = f"batch ({text(self.batch)}), rows ({text(self.rows)}), inner ({text(self.inner)})"
        copies = f", copies {self.copied:,} elements a token" if self.copied else ""
        return f"{parts}, columns ({text(self.columns)}): ({text(self.source)}) -> ({text(self.result)}){copies}"


Plan = tuple[tuple[Step, ...], ...]  # the steps of every term


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> Plan:
    """The steps of every term; the first reads and the last writes token-major.

    >>> import einlinear as el
    >>> for step in plan(el.structure("btt", 64, 64))[0]:
    ...     print(step)
    batch (g), rows (r f), inner (a), columns (tokens): (tokens g a) -> (g r f tokens)
    batch (f), rows (e), inner (g r), columns (tokens): (g r f tokens) -> (tokens f e)
    """
    sizes, numbered = dict(structure.sizes), range(len(structure.factors))
    return tuple(_plan_term(term, numbers[0], sizes) for term, numbers in structure.by_term(numbered))


def is_run(group: Axes, layout: Axes) -> bool:
    """Whether the axes stand next to each other, in this order, in the layout: then merging them is a view."""
    return not group or group == layout[layout.index(group[0]) :][: len(group)]


def _plan_term(term: Term, first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    count = len(term.factors)
    orders = permutations(range(count)) if count <= _MAX_ORDERED else iter([tuple(range(count))])
    plans = (steps for order in orders for steps in [_best_layouts(term, order, first, sizes)])
    return min(plans, key=lambda steps: sum(step.cost for step in steps))  # the first of equals: the usual order


def _best_layouts(term: Term, order: Sequence[int], first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    """The cheapest way through the layouts of the states: after every step, the best way to each of them is kept."""
    ways: dict[Axes, tuple[int, tuple[Step, ...]]] = {(TOKENS, *term.inputs): (0, ())}
    for position, index in enumerate(order):
        axes = term.factors[index].axes
        later = {axis for i in order[position + 1 :] for axis in term.factors[i].axes} | set(term.outputs)
        next_axes = term.factors[order[position + 1]].axes if position + 1 < len(order) else ()
        found: dict[Axes, tuple[int, tuple[Step, ...]]] = {}
        for source, (cost, steps) in ways.items():
            results = _layouts(source, axes, next_axes, later) if next_axes else [(TOKENS, *term.outputs)]
            for result in results:
                for step in _steps(first + index, axes, source, result, later, sizes):
                    total = cost + step.cost
                    if result not in found or total < found[result][0]:
                        found[result] = total, (*steps, step)
        ways = dict(sorted(found.items(), key=lambda way: way[1][0])[:_KEPT])
    return min(ways.values(), key=lambda way: way[0])[1]


def _layouts(source: Axes, factor: Axes, next_factor: Axes, later: set[str]) -> Iterator[Axes]:
    """Candidates for the state after a step: its batch, rows and columns in any order, tokens last or first."""
    kept = [axis for axis in source if axis != TOKENS and axis in later]
    batch = tuple(axis for axis in kept if axis in factor)
    columns = tuple(axis for axis in kept if axis not in factor)
    rows = tuple(axis for axis in factor if axis not in source)
    # what the next step takes together stays together
    groups = [g for group in (batch, rows, columns) for g in _split(group, next_factor) if g]
    usual = len(groups) > 5  # many axes: only the order they come in
    for order in [groups] if usual else permutations(groups):
        merged = tuple(axis for group in order for axis in group)
        yield from ((*merged, TOKENS), (TOKENS, *merged)) if batch else ((TOKENS, *merged), (*merged, TOKENS))


def _split(group: Axes, next_factor: Axes) -> tuple[Axes, Axes]:
    return tuple(a for a in group if a in next_factor), tuple(a for a in group if a not in next_factor)


def _steps(
    index: int, factor: Axes, source: Axes, result: Axes, later: set[str], sizes: Mapping[str, int]
) -> Iterator[Step]:
    """The step between two layouts; every group in the order in which it lies in memory, so that it merges."""
    batch = tuple(a for a in source if a in factor and a in later)
    inner = tuple(a for a in source if a in factor and a not in later)
    columns = tuple(a for a in result if a in source and a not in factor)
    rows = tuple(a for a in result if a not in source)
    macs = math.prod(sizes[a] for a in (*batch, *rows, *inner, *columns) if a != TOKENS)
    choices = [(batch, columns)]
    if not batch and len(columns) > 1 and columns[0] == TOKENS:
        choices.append((columns[:1], columns[1:]))  # one product per token
    for batch, columns in choices:
        copied = 0
        if not all(is_run(group, source) for group in (batch, inner, columns)):
            copied += math.prod(sizes[a] for a in source if a != TOKENS)
        if not all(is_run(group, result) for group in (batch, rows, columns)):
            copied += math.prod(sizes[a] for a in result if a != TOKENS)
        yield Step(index, factor, batch, rows, inner, columns, source, result, macs, copied)
