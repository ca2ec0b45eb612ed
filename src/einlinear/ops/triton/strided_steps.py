"""The plan of the Triton backend: contraction steps with sizes and strides as numbers.

A kernel walks each group of axes (batch, contracted, free, new) by one flat index and finds the index of every axis by
division. Sizes and strides are constants of the compiled kernel, so any order of axes is read and written in place:
nothing is copied or transposed. Axes that are neighbours in all tensors are merged first, so that most groups need no
division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import mul

from einlinear.structures import Factor, Structure
from einlinear.structures.pattern import Axes

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
    sizes: Mapping[str, int]
    features: int
    tokens_last: bool = False

    @property
    def fastest_axis(self) -> str | None:
        """The axis whose entries are neighbours in memory; None for the tokens."""
        long = [axis for axis in self.axes if self.sizes[axis] > 1]
        return None if self.tokens_last or not long else long[-1]

    @property
    def limit(self) -> int:
        """The number of features if there is padding, else 0."""
        return self.features if self.features < math.prod(self.sizes[axis] for axis in self.axes) else 0


@dataclass(frozen=True, eq=False)
class StridedStep:
    """The contraction of one factor, with the layouts of the source and of the result.

    Attributes:
        factor: the axes of the factor.
        batch, free, new, contracted: the groups of axes, as in `einlinear.structures.Factor`.
        source, result: the layouts.
    """

    factor: Axes
    batch: Axes
    free: Axes
    new: Axes
    contracted: Axes
    source: Layout
    result: Layout

    @cached_property
    def transposed(self) -> StridedStep:
        """The step from the gradient of the result to the gradient of the source."""
        return replace(self, new=self.contracted, contracted=self.new, source=self.result, result=self.source)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The groups as constants of the kernels."""
        groups = {"BATCH": self.batch, "FREE": self.free, "NEW": self.new, "CONTRACTED": self.contracted}
        return {name: self._group(axes) for name, axes in groups.items()}

    @cached_property
    def counts(self) -> tuple[int, int, int, int]:
        """The number of entries of each group: batch, free, new, contracted."""
        b, f, n, k = (math.prod(axis[0] for axis in group) for group in self.groups.values())
        return b, f, n, k

    @property
    def params(self) -> int:
        """The number of entries of the factor."""
        return math.prod(self.source.sizes[axis] for axis in self.factor)

    def run(self, axes: Axes) -> int:
        """Return the number of features of a group that are neighbours in the source or the result."""
        return max((self.source.sizes[axis] for axis in axes if axis in self._fastest_axes), default=1)

    @property
    def _fastest_axes(self) -> tuple[str | None, str | None]:
        return self.source.fastest_axis, self.result.fastest_axis

    def _group(self, axes: Axes) -> Group:
        """The sizes and strides of a group, neighbours merged; never empty."""
        size = self.source.sizes
        strides = [_strides(axes, size) for axes in (self.factor, self.source.axes, self.result.axes)]
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
    sizes, terms = dict(structure.sizes), []
    for term in structure.terms:
        between = (_between(first, second, sizes) for first, second in pairwise(term.factors))
        outputs = Layout(term.outputs, sizes, structure.out_features)
        layouts = pairwise((Layout(term.inputs, sizes, structure.in_features), *between, outputs))
        steps = [
            StridedStep(f.axes, f.batch, f.free, f.new, f.contracted, *ends) for f, ends in zip(term.factors, layouts)
        ]
        terms.append(tuple(steps))
    return tuple(terms)


def _between(first: Factor, second: Factor, sizes: Mapping[str, int]) -> Layout:
    """The layout of an intermediate that both steps reach in runs of at least a sector.

    It is token-major if a new axis of the first step is long enough and the second step contracts it or keeps it free.
    Otherwise (as in a BTT of small rank, whose new axes are the batch of the next step) the tokens come last.
    """
    axes = (*first.batch, *first.free, *first.new)
    long = [axis for axis in first.new if 2 * sizes[axis] >= SECTOR and axis not in second.batch]
    features = math.prod(sizes[axis] for axis in axes)
    if not long:
        return Layout(axes, sizes, features, tokens_last=True)
    last = max(long, key=lambda axis: (axis in second.contracted, sizes[axis]))
    return Layout((*(axis for axis in axes if axis != last), last), sizes, features)


def _strides(axes: Axes, size: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(reversed(axes), accumulate((size[axis] for axis in reversed(axes)), mul, initial=1)))
