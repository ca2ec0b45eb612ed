"""The plan of batched matmuls: the order and the layouts of a structure's contractions with the least MACs and copies.

A step multiplies a factor (batch, new, contracted) with an intermediate (batch, contracted, free). It is copied first
unless the axes of each group are neighbours in memory. A layout lists axes, the slowest one first.
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
# candidates for the layout after every step
_MAX_LAYOUTS = 16
# MACs that take as long as copying an element does
_MACS_PER_COPY = 16


@lru_cache(maxsize=4096)
def matmul_steps(structure: Structure) -> tuple[tuple[Step, ...], ...]:
    """Return the steps of every term; the first reads and the last writes token-major.

    >>> import einlinear as el
    >>> for step in matmul_steps(el.structure("btt", 64, 64))[0]:
    ...     print(step)
    batch (g), contracted (a), free (tokens), new (r f): (tokens g a) -> (g r f tokens)
    batch (f), contracted (g r), free (tokens), new (e): (g r f tokens) -> (tokens f e)
    """
    sizes, numbered = dict(structure.sizes), range(len(structure.factors))
    return tuple(_plan_term(term, numbers[0], sizes) for term, numbers in structure.by_term(numbered))


@dataclass(frozen=True)
class Step:
    """The contraction of `Structure.factors[index]`: its groups of axes, and layouts from the slowest axis on."""

    index: int
    factor: Axes
    # shared by factor and input, and kept by the output; or axes over which the factor is repeated
    batch: Axes
    contracted: Axes
    # the tokens among them
    free: Axes
    new: Axes
    source: Axes
    result: Axes
    # MACs and copied elements for one token
    cost: int
    copied: int

    @property
    def repeats(self) -> bool:
        """Whether the same matrix multiplies every batch entry."""
        return bool(self.batch) and self.batch[0] not in self.factor

    @cached_property
    def is_dense(self) -> bool:
        """Whether the step is a product of one matrix with contiguous vectors, as in `F.linear`."""
        ends = (TOKENS, *self.contracted), (TOKENS, *self.new), (*self.new, *self.contracted)
        return ends == (self.source, self.result, self.factor) and len(self.factor) == 2

    def __str__(self) -> str:
        def text(axes: Axes) -> str:
            return " ".join(axis or "tokens" for axis in axes) or "1"

        groups = ", ".join(f"{name} ({text(getattr(self, name))})" for name in ("batch", "contracted", "free", "new"))
        copies = f", copies {self.copied:,} elements a token" if self.copied else ""
        return f"{groups}: ({text(self.source)}) -> ({text(self.result)}){copies}"


def _plan_term(term: Term, first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    count = len(term.factors)
    # with many factors, the order with the fewest MACs is the only candidate
    orders = permutations(range(count)) if count <= 3 else iter([tuple(range(count))])
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
        extended: dict[Axes, tuple[int, tuple[Step, ...]]] = {}
        for source, (cost, steps) in paths.items():
            results = _layouts(source, axes, next_axes, later) if next_axes else [(TOKENS, *term.outputs)]
            for result in results:
                for step in _steps(first + index, axes, source, result, later, sizes):
                    total = cost + step.cost
                    if result not in extended or total < extended[result][0]:
                        extended[result] = total, (*steps, step)
        paths = dict(sorted(extended.items(), key=lambda path: path[1][0])[:_MAX_LAYOUTS])
    return min(paths.values(), key=lambda path: path[0])[1]


def _layouts(source: Axes, factor: Axes, next_factor: Axes, later: set[str]) -> Iterator[Axes]:
    """Yield layouts for the output of a step: its groups of axes in any order, tokens last or first."""
    remaining = [axis for axis in source if axis != TOKENS and axis in later]
    batch, free = [a for a in remaining if a in factor], [a for a in remaining if a not in factor]
    new = [axis for axis in factor if axis not in source]
    # axes that the next step treats alike stay together
    halves = [tuple(a for a in g if (a in next_factor) == both) for g in (batch, new, free) for both in (True, False)]
    groups = [half for half in halves if half]
    # with many axes, only the order in which they come
    for order in [groups] if len(groups) > 5 else permutations(groups):
        merged = tuple(axis for group in order for axis in group)
        yield from ((*merged, TOKENS), (TOKENS, *merged)) if batch else ((TOKENS, *merged), (*merged, TOKENS))


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
        yield Step(index, factor, batch, contracted, free, new, source, result, macs + _MACS_PER_COPY * copied, copied)


def is_run(group: Axes, layout: Axes) -> bool:
    """Return whether the axes are neighbours, in this order, in the layout: then merging them is a view."""
    return not group or group == layout[layout.index(group[0]) :][: len(group)]
