"""A structure as the compiled kernel reads it: an array of numbers, arranged as `Program` in program.h says.

For every contraction step these are the sizes of its matrix products, and tables that say where their rows lie.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from einlinear.structures import Structure
from einlinear.structures.pattern import Axes


class Program:
    """The numbers, in memory.

    Attributes:
        address: where they lie.
        pointers: the type of an array with a pointer for each factor.
        intermediate_size: the size of all intermediate states, for one input vector.
    """

    def __init__(self, structure: Structure) -> None:
        self.macs, self._sizes = structure.macs, dict(structure.sizes)
        self.pointers = ctypes.c_void_p * len(structure.factors)
        self.intermediate_size = 0
        numbers = [len(structure.terms), structure.in_features, structure.out_features]
        position = itertools.count()
        for term in structure.terms:
            numbers.append(len(term.factors))
            before = term.inputs
            for factor, following in zip(term.factors, (*term.factors[1:], None), strict=True):
                # groups in the factor's own order, so that it is read in large pieces
                batch, inner = (
                    tuple(a for a in factor.axes if a in group) for group in (factor.batch, factor.contracted)
                )
                rows = factor.new
                columns = tuple(a for a in before if a in factor.free)
                after = term.outputs
                if following is not None:  # laid out as the next step reads it
                    after = (
                        *(a for a in following.axes if a in following.batch),
                        *(a for a in before + rows if a in following.free),
                        *(a for a in following.axes if a in following.contracted),
                    )
                    self.intermediate_size += self._size(after)
                groups = (batch, columns, rows, inner)
                numbers += [next(position), *map(self._size, groups), self._size(before), self._size(after)]
                tables = [
                    self._offsets(group, layout)
                    for layout, of in (
                        (before, (batch, columns, inner)),
                        (after, (batch, columns, rows)),
                        (factor.axes, (batch, rows, inner)),
                    )
                    for group in of
                ]
                numbers += [_stride(tables[i]) for i in (2, 5, 7, 8)]
                numbers += itertools.chain(*tables)
                before = after
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._numbers)

    def _size(self, axes: Axes) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _offsets(self, group: Axes, layout: Axes) -> list[int]:
        """Where the entries of a group of axes lie in row-major memory of this layout."""
        offsets = [0]
        for axis in group:
            stride = self._size(layout[layout.index(axis) + 1 :])
            offsets = [start + stride * i for start in offsets for i in range(self._sizes[axis])]
        return offsets


def _stride(offsets: Sequence[int]) -> int:
    """What lies between two neighbours, or 0 where that is not always the same."""
    stride = offsets[1] if len(offsets) > 1 else 1
    return stride if all(offset == i * stride for i, offset in enumerate(offsets)) else 0


@lru_cache(maxsize=4096)
def program_of(structure: Structure) -> Program:
    """The structure's program, from memory."""
    return Program(structure)
