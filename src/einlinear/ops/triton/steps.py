"""Where everything lies: a term as steps whose axes are grouped by the part they play, with integer strides.

A step multiplies a factor with the state. Its axes fall into four groups:

    batch      in the factor, in the state before and in the state after
    columns    only in the states: the same matrix serves all of them
    rows       in the factor and in the state after
    inner      in the factor and in the state before: summed

A kernel walks a group by one flat index and finds the digits of its axes by division; sizes and strides are constants
of the compiled kernel. So any order of axes is read and written in place: nothing is copied or transposed. Axes that
lie next to each other everywhere are merged first, so that most groups need no division at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

Sizes = tuple[tuple[str, int], ...]
Group = tuple[tuple[int, ...], ...]  # per axis, slowest first: its size, then its strides; 0 in a tensor without it

SECTOR = 32  # bytes: what the device's memory moves at once


@dataclass(frozen=True, eq=False)
class Layout:
    """How a state lies in memory: its axes, slowest first, and the tokens before (or after) all of them.

    `features` are those that exist: where it is less than the product of the sizes, trailing ones are padding.
    """

    axes: Axes
    sizes: Sizes
    features: int
    tokens_last: bool = False

    @cached_property
    def strides(self) -> dict[str, int]:
        return _strides(self.axes, dict(self.sizes))

    @property
    def unit(self) -> str | None:
        """The axis along which neighbours in memory lie: the tokens, or the last one that is longer than 1."""
        long = [axis for axis in self.axes if dict(self.sizes)[axis] > 1]
        return None if self.tokens_last or not long else long[-1]

    @property
    def limit(self) -> int:
        """The number of features where kernels must look out for padding, else 0."""
        return self.features if self.features < math.prod(dict(self.sizes)[axis] for axis in self.axes) else 0


class Groups(NamedTuple):
    """The groups of a step; the strides of an axis are those in the factor, the source and the result."""

    batch: Group
    columns: Group
    rows: Group
    inner: Group


@dataclass(frozen=True, eq=False)
class Step:
    """One factor's product: the part every axis plays, and how the states before and after lie in memory."""

    factor: Axes
    batch: Axes
    columns: Axes
    rows: Axes
    inner: Axes
    source: Layout
    result: Layout
    sizes: Sizes

    @cached_property
    def transposed(self) -> Step:
        """The step that takes the gradient of the result to that of the source."""
        return Step(self.factor, self.batch, self.columns, self.inner, self.rows, self.result, self.source, self.sizes)

    @cached_property
    def groups(self) -> Groups:
        size = dict(self.sizes)
        strides = _strides(self.factor, size), self.source.strides, self.result.strides
        return Groups(
            *(_group(self._order(axes), size, strides) for axes in (self.batch, self.columns, self.rows, self.inner))
        )

    @cached_property
    def counts(self) -> tuple[int, int, int, int]:
        """B, C, R, K: how many entries the groups have."""
        b, c, r, k = map(count, self.groups)
        return b, c, r, k

    @property
    def params(self) -> int:
        """The entries of the factor."""
        return math.prod(dict(self.sizes)[axis] for axis in self.factor)

    def run(self, group: str) -> int:
        """How many entries of the group lie next to each other in the source or the result, counted in features."""
        axes: Axes = getattr(self, group)
        units = (self.source.unit, self.result.unit)
        return max((dict(self.sizes)[axis] for axis in axes if axis in units), default=1)

    def _order(self, axes: Axes) -> Axes:
        """As in the factor, where they merge best; the axis that memory runs along last."""
        order = (*self.factor, *self.source.axes)
        return tuple(sorted(axes, key=lambda axis: (axis in (self.source.unit, self.result.unit), order.index(axis))))


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> tuple[tuple[Step, ...], ...]:
    """The steps of every term. The first reads and the last writes token-major."""
    return tuple(_plan_term(term, structure) for term in structure.terms)


def _plan_term(term: Term, structure: Structure) -> tuple[Step, ...]:
    sizes, steps = structure.sizes, []
    source = Layout(term.inputs, sizes, structure.in_features)
    for position, factor in enumerate(term.factors):
        if position + 1 < len(term.factors):
            after = term.factors[position + 1]
            axes = (*factor.batch, *factor.free, *factor.new)
            result = _between(axes, factor.new, after.axes, after.contracted, sizes)
        else:
            result = Layout(term.outputs, sizes, structure.out_features)
        groups = factor.batch, factor.free, factor.new, factor.contracted
        steps.append(Step(factor.axes, *groups, source, result, sizes))
        source = result
    return tuple(steps)


def _between(axes: Axes, written: Axes, read: Axes, summed: Axes, sizes: Sizes) -> Layout:
    """The layout of a state between two steps, such that both reach it in runs of at least a sector.

    That is token-major if an axis that the first step writes as rows is long enough, and the second one sums it or
    has it as columns. Otherwise (a BTT of small rank: what one step writes as rows is the other's batch) it is the
    tokens that lie next to each other.
    """
    size = dict(sizes)
    runs = [axis for axis in written if 2 * size[axis] >= SECTOR and (axis in summed or axis not in read)]
    features = math.prod(size[axis] for axis in axes)
    if not runs:
        return Layout(axes, sizes, features, tokens_last=True)
    last = max(runs, key=lambda axis: (axis in summed, size[axis]))
    return Layout((*(axis for axis in axes if axis != last), last), sizes, features)


class Roles(NamedTuple):
    """The groups of a fused pair of steps, named as in (g b a), g r f d a, f e g r b -> (f e d).

    `outer` are axes of the input and the output. Strides are those in the first factor, the second factor, the source,
    the middle and the result.
    """

    outer: Group
    a: Group
    b: Group
    g: Group
    d: Group
    e: Group
    f: Group
    r: Group


@lru_cache(maxsize=4096)
def roles(first: Step, second: Step) -> Roles:
    """The part that every axis plays in two steps at once."""
    size = dict(first.sizes)
    strides = (
        _strides(first.factor, size),
        _strides(second.factor, size),
        first.source.strides,
        first.result.strides,
        second.result.strides,
    )
    units = {layout.unit for layout in (first.source, first.result, second.result)}

    def common(before: Axes, after: Axes) -> Group:
        axes = sorted((axis for axis in before if axis in after), key=lambda axis: axis in units)
        return _group(axes, size, strides)

    kept = first.batch + first.columns
    return Roles(
        outer=common(kept, second.batch + second.columns),
        a=common(first.inner, first.inner),
        b=common(first.columns, second.inner),
        g=common(first.batch, second.inner),
        d=common(first.rows, second.columns),
        e=common(second.rows, second.rows),
        f=common(first.rows, second.batch),
        r=common(first.rows, second.inner),
    )


def count(group: Group) -> int:
    """The number of entries of a group."""
    return math.prod(axis[0] for axis in group)


def _strides(axes: Axes, size: Mapping[str, int]) -> dict[str, int]:
    strides, stride = {}, 1
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= size[axis]
    return strides


def _group(axes: Iterable[str], size: Mapping[str, int], strides: Iterable[Mapping[str, int]]) -> Group:
    """The axes of a group with their strides, neighbours merged where every tensor allows it; never empty."""
    strides = tuple(strides)
    merged: list[tuple[int, ...]] = []
    for axis in axes:
        entry = (size[axis], *(tensor.get(axis, 0) for tensor in strides))
        if entry[0] == 1:
            continue
        if merged and all(slow == fast * entry[0] for slow, fast in zip(merged[-1][1:], entry[1:], strict=True)):
            entry = (merged.pop()[0] * entry[0], *entry[1:])
        merged.append(entry)
    return tuple(merged) or ((1, *(0 for _ in strides)),)
