"""Parts of printed reports on the layers of a model: aligned tables and totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, with aligned columns.

    >>> aligned([("layer", "params"), ("head", "640")])
    ['layer  params', 'head   640']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class LayerCounts(Protocol):
    """Counts of one layer: parameters and multiply-accumulates of its weight, before and after."""

    @property
    def params_before(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def macs_before(self) -> int: ...
    @property
    def macs(self) -> int: ...


class Totals:
    """Base class of reports that sums the counts of their layers."""

    def counts(self) -> Sequence[LayerCounts]:
        """Return the counts of every layer."""
        raise NotImplementedError

    @property
    def params_before(self) -> int:
        return sum(layer.params_before for layer in self.counts())

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.counts())

    @property
    def macs_before(self) -> int:
        return sum(layer.macs_before for layer in self.counts())

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.counts())
