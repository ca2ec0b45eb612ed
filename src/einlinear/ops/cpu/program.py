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
    """The array of numbers, in memory.

    Attributes:
        address: of the array.
        pointers: the type of an array with a pointer for each factor.
        intermediate_size: the size of all intermediates, for one input vector.
        macs: multiply-accumulates for one input vector.
    """

    def __init__(self, structure: Structure) -> None:
        self.macs, self._sizes = structure.macs, dict(structure.sizes)
        self.pointers = ctypes.c_void_p * len(structure.factors)
        self.intermediate_size = 0
        numbers = [len(structure.factors), len(structure.terms), structure.in_features, structure.out_features]
        for i, term in enumerate(structure.terms):
            source = term.inputs
            for factor, following in zip(term.factors, (*term.factors[1:], None), strict=True):
                # groups in the factor's own order, so that it is read in large pieces
                batch, contracted = (tuple(a for a in factor.axes if a in g) for g in (factor.batch, factor.contracted))
                free, new = tuple(a for a in source if a in factor.free), factor.new
                result = term.outputs
                if following is not None:
                    # laid out as the next step reads it
                    result = (
                        *(a for a in following.axes if a in following.batch),
                        *(a for a in source + new if a in following.free),
                        *(a for a in following.axes if a in following.contracted),
                    )
                    self.intermediate_size += self._size(result)
                numbers += [i, factor is term.factors[0], following is None]
                numbers += map(self._size, (batch, free, new, contracted, source, result))
                tables = [
                    self._offsets(group, layout)
                    for layout, layout_groups in (
                        (source, (batch, free, contracted)),
                        (result, (batch, free, new)),
                        (factor.axes, (batch, new, contracted)),
                    )
                    for group in layout_groups
                ]
                numbers += [_stride(tables[i]) for i in (2, 5, 7, 8)]
                numbers += itertools.chain(*tables)
                source = result
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._numbers)

    def _size(self, axes: Axes) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _offsets(self, group: Axes, layout: Axes) -> list[int]:
        """Return where the entries of a group of axes lie in row-major memory of a layout."""
        offsets = [0]
        for axis in group:
            stride = self._size(layout[layout.index(axis) + 1 :])
            offsets = [start + stride * i for start in offsets for i in range(self._sizes[axis])]
        return offsets


def _stride(offsets: Sequence[int]) -> int:
    """Return the distance of two neighbours, or 0 where that is not constant."""
    stride = offsets[1] if len(offsets) > 1 else 1
    return stride if all(offset == i * stride for i, offset in enumerate(offsets)) else 0


@lru_cache(maxsize=4096)
def program_of(structure: Structure) -> Program:
    """Return the program of a structure, from a cache."""
    return Program(structure)
