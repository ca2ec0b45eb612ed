"""The plan of the Triton backend: contraction steps with sizes and strides as numbers.

A kernel walks each group of axes (batch, contracted, free, new) by one flat index and finds the index of every axis by
division. Sizes and strides are constants of the compiled kernel, so any order of axes is read and written in place:
nothing is copied or transposed. Axes that are neighbours in all tensors are merged first, so that most groups need no
division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from einlinear.structures import Factor, Structure
from einlinear.structures.pattern import Axes

Sizes = tuple[tuple[str, int], ...]
# for each axis, slowest first: its size, its strides in the factor, the source and the result (0 where it is absent)
Group = tuple[tuple[int, ...], ...]

# bytes that the memory of a GPU moves at once
SECTOR = 32


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of an input, intermediate or output in memory.

    Attributes:
        axes: slowest first.
        sizes: of these axes, and perhaps of others.
        features: the number of features that exist. Up to the product of the sizes, the rest is padding.
        tokens_last: whether tokens are the fastest axis. If not, they are the slowest.
    """

    axes: Axes
    sizes: Sizes
    features: int
    tokens_last: bool = False

    @cached_property
    def strides(self) -> dict[str, int]:
        return _strides(self.axes, dict(self.sizes))

    @property
    def fastest_axis(self) -> str | None:
        """The axis whose entries are neighbours in memory; None for the tokens."""
        long = [axis for axis in self.axes if dict(self.sizes)[axis] > 1]
        return None if self.tokens_last or not long else long[-1]

    @property
    def limit(self) -> int:
        """The number of features if there is padding, else 0."""
        return self.features if self.features < math.prod(dict(self.sizes)[axis] for axis in self.axes) else 0


class Groups(NamedTuple):
    """The groups of axes of a step."""

    batch: Group
    free: Group
    new: Group
    contracted: Group


@dataclass(frozen=True, eq=False)
class StridedStep:
    """The contraction of one factor, with the layouts of the source and of the result.

    Attributes:
        factor: the axes of the factor.
        batch, free, new, contracted: the groups of axes, as in `einlinear.structures.Factor`.
        source, result: the layouts.
        sizes: of all axes.
    """

    factor: Axes
    batch: Axes
    free: Axes
    new: Axes
    contracted: Axes
    source: Layout
    result: Layout
    sizes: Sizes

    @cached_property
    def transposed(self) -> StridedStep:
        """The step from the gradient of the result to the gradient of the source."""
        groups = self.batch, self.free, self.contracted, self.new
        return StridedStep(self.factor, *groups, self.result, self.source, self.sizes)

    @cached_property
    def groups(self) -> Groups:
        return Groups(*map(self._group, (self.batch, self.free, self.new, self.contracted)))

    @cached_property
    def counts(self) -> tuple[int, int, int, int]:
        """The number of entries of each group: batch, free, new, contracted."""
        b, f, n, k = (math.prod(axis[0] for axis in group) for group in self.groups)
        return b, f, n, k

    @property
    def params(self) -> int:
        """The number of entries of the factor."""
        return math.prod(dict(self.sizes)[axis] for axis in self.factor)

    def run(self, axes: Axes) -> int:
        """How many entries of a group are neighbours in the source or the result, counted in features."""
        return max((dict(self.sizes)[axis] for axis in axes if axis in self._fastest_axes), default=1)

    @property
    def _fastest_axes(self) -> tuple[str | None, str | None]:
        return self.source.fastest_axis, self.result.fastest_axis

    def _group(self, axes: Axes) -> Group:
        """The sizes and strides of a group, neighbours merged; never empty."""
        size = dict(self.sizes)
        strides = _strides(self.factor, size), self.source.strides, self.result.strides
        # in the order of the factor, where most axes merge; the fastest axis of the source or the result last
        order = (*self.factor, *self.source.axes)
        merged: list[tuple[int, ...]] = []
        for axis in sorted(axes, key=lambda axis: (axis in self._fastest_axes, order.index(axis))):
            entry = (size[axis], *(tensor.get(axis, 0) for tensor in strides))
            if entry[0] == 1:
                continue
            if merged and all(slow == fast * entry[0] for slow, fast in zip(merged[-1][1:], entry[1:], strict=True)):
                entry = (merged.pop()[0] * entry[0], *entry[1:])
            merged.append(entry)
        return tuple(merged) or ((1, 0, 0, 0),)


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> tuple[tuple[StridedStep, ...], ...]:
    """The steps of every term. Inputs and outputs are token-major."""
    terms = []
    for term in structure.terms:
        between = (_between(*pair, structure.sizes) for pair in zip(term.factors, term.factors[1:]))
        outputs = Layout(term.outputs, structure.sizes, structure.out_features)
        layouts = [Layout(term.inputs, structure.sizes, structure.in_features), *between, outputs]
        terms.append(
            tuple(
                StridedStep(f.axes, f.batch, f.free, f.new, f.contracted, source, result, structure.sizes)
                for f, source, result in zip(term.factors, layouts, layouts[1:])
            )
        )
    return tuple(terms)


def _between(first: Factor, second: Factor, sizes: Sizes) -> Layout:
    """The layout of an intermediate that both steps reach in runs of at least a sector.

    It is token-major if a new axis of the first step is long enough and the second step contracts it or keeps it free.
    Otherwise (as in a BTT of small rank, whose new axes are the batch of the next step) the tokens come last.
    """
    size = dict(sizes)
    axes = (*first.batch, *first.free, *first.new)
    long = [axis for axis in first.new if 2 * size[axis] >= SECTOR and axis not in second.batch]
    features = math.prod(size[axis] for axis in axes)
    if not long:
        return Layout(axes, sizes, features, tokens_last=True)
    last = max(long, key=lambda axis: (axis in second.contracted, size[axis]))
    return Layout((*(axis for axis in axes if axis != last), last), sizes, features)


def _strides(axes: Axes, size: Mapping[str, int]) -> dict[str, int]:
    strides, stride = {}, 1
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= size[axis]
    return strides
