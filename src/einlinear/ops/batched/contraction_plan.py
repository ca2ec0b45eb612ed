"""The plan of the batched-matmul backend: the order of contraction, and the layouts of the intermediates.

A step multiplies a factor (batch, new, contracted) with an intermediate (batch, contracted, free), where the free axes
are the tokens and those that the factor does not have. A group of axes that are neighbours in memory is one dimension
of a strided matrix product; where they are not, the intermediate has to be copied first. The plan minimises the work
over orders of contraction and layouts, token-major or feature-major: copies, then multiply-accumulates. A two-factor
BTT copies no activation at all; its intermediate is feature-major, tokens last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations

from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

# the axis of the tokens; no axis of a pattern has this name
TOKENS = ""
# with more factors, the order with the fewest MACs is the only candidate
_MAX_ORDERED = 3
# candidates for the layout after every step
_MAX_LAYOUTS = 16
# MACs that take as long as copying an element does
_COPY = 16


@dataclass(frozen=True)
class Step:
    """One contraction.

    Attributes:
        index: of the factor in `Structure.factors`.
        factor: the axes of the factor.
        batch: axes that factor and input share and the output keeps; or, if the factor has none of them, axes over
            which it is repeated.
        contracted: axes of both that are summed over.
        free: axes that only the input has.
        new: axes that only the factor has.
        source, result: all axes of the input and of the output, the slowest first.
        macs, copied: multiply-accumulates and copied elements for one token.
    """

    index: int
    factor: Axes
    batch: Axes
    contracted: Axes
    free: Axes
    new: Axes
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
        """Whether the step is a product of one matrix with contiguous vectors, as in `F.linear`."""
        ends = (TOKENS, *self.contracted), (TOKENS, *self.new), (*self.new, *self.contracted)
        return ends == (self.source, self.result, self.factor) and len(self.factor) == 2

    @property
    def cost(self) -> int:
        """The cost for one token, in MACs."""
        return self.macs + _COPY * self.copied

    def __str__(self) -> str:
        def text(axes: Axes) -> str:
            return " ".join(axis or "tokens" for axis in axes) or "1"

        groups = f"batch ({text(self.batch)}), contracted ({text(self.contracted)})"
        groups += f", free ({text(self.free)}), new ({text(self.new)})"
        copies = f", copies {self.copied:,} elements a token" if self.copied else ""
        return f"{groups}: ({text(self.source)}) -> ({text(self.result)}){copies}"


# the steps of every term
Plan = tuple[tuple[Step, ...], ...]


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> Plan:
    """Return the steps of every term; the first reads and the last writes token-major.

    >>> import einlinear as el
    >>> for step in plan(el.structure("btt", 64, 64))[0]:
    ...     print(step)
    batch (g), contracted (a), free (tokens), new (r f): (tokens g a) -> (g r f tokens)
    batch (f), contracted (g r), free (tokens), new (e): (g r f tokens) -> (tokens f e)
    """
    sizes, numbered = dict(structure.sizes), range(len(structure.factors))
    return tuple(_plan_term(term, numbers[0], sizes) for term, numbers in structure.by_term(numbered))


def is_run(group: Axes, layout: Axes) -> bool:
    """Return whether the axes are neighbours, in this order, in the layout: then merging them is a view."""
    return not group or group == layout[layout.index(group[0]) :][: len(group)]


def _plan_term(term: Term, first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    count = len(term.factors)
    orders = permutations(range(count)) if count <= _MAX_ORDERED else iter([tuple(range(count))])
    plans = (_best_layouts(term, order, first, sizes) for order in orders)
    # the first of equals is the usual order
    return min(plans, key=lambda steps: sum(step.cost for step in steps))


def _best_layouts(term: Term, order: Sequence[int], first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    """Return the cheapest steps in an order: a shortest path through the layouts of the intermediates."""
    paths: dict[Axes, tuple[int, tuple[Step, ...]]] = {(TOKENS, *term.inputs): (0, ())}
    for position, index in enumerate(order):
        axes = term.factors[index].axes
        later = {axis for i in order[position + 1 :] for axis in term.factors[i].axes} | set(term.outputs)
        next_axes = term.factors[order[position + 1]].axes if position + 1 < len(order) else ()
        longer: dict[Axes, tuple[int, tuple[Step, ...]]] = {}
        for source, (cost, steps) in paths.items():
            results = _layouts(source, axes, next_axes, later) if next_axes else [(TOKENS, *term.outputs)]
            for result in results:
                for step in _steps(first + index, axes, source, result, later, sizes):
                    total = cost + step.cost
                    if result not in longer or total < longer[result][0]:
                        longer[result] = total, (*steps, step)
        paths = dict(sorted(longer.items(), key=lambda path: path[1][0])[:_MAX_LAYOUTS])
    return min(paths.values(), key=lambda path: path[0])[1]


def _layouts(source: Axes, factor: Axes, next_factor: Axes, later: set[str]) -> Iterator[Axes]:
    """Yield layouts for the output of a step: its groups of axes in any order, tokens last or first."""
    remaining = [axis for axis in source if axis != TOKENS and axis in later]
    batch = tuple(axis for axis in remaining if axis in factor)
    free = tuple(axis for axis in remaining if axis not in factor)
    new = tuple(axis for axis in factor if axis not in source)
    # axes that the next step treats alike stay together
    groups = [g for group in (batch, new, free) for g in _split(group, next_factor) if g]
    # with many axes, only the order in which they come
    many = len(groups) > 5
    for order in [groups] if many else permutations(groups):
        merged = tuple(axis for group in order for axis in group)
        yield from ((*merged, TOKENS), (TOKENS, *merged)) if batch else ((TOKENS, *merged), (*merged, TOKENS))


def _split(group: Axes, next_factor: Axes) -> tuple[Axes, Axes]:
    return tuple(a for a in group if a in next_factor), tuple(a for a in group if a not in next_factor)


def _steps(
    index: int, factor: Axes, source: Axes, result: Axes, later: set[str], sizes: Mapping[str, int]
) -> Iterator[Step]:
    """Yield the steps between two layouts; every group in the order in which it lies in memory, so that it merges."""
    batch = tuple(a for a in source if a in factor and a in later)
    contracted = tuple(a for a in source if a in factor and a not in later)
    free = tuple(a for a in result if a in source and a not in factor)
    new = tuple(a for a in result if a not in source)
    macs = math.prod(sizes[a] for a in (*batch, *contracted, *free, *new) if a != TOKENS)
    choices = [(batch, free)]
    if not batch and len(free) > 1 and free[0] == TOKENS:
        # one product per token
        choices.append((free[:1], free[1:]))
    for batch, free in choices:
        copied = 0
        for layout, groups in ((source, (batch, contracted, free)), (result, (batch, free, new))):
            if not all(is_run(group, layout) for group in groups):
                copied += math.prod(sizes[a] for a in layout if a != TOKENS)
        yield Step(index, factor, batch, contracted, free, new, source, result, macs, copied)
