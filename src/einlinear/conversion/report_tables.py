"""Parts of printed reports on the layers of a model: aligned tables and totals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, with aligned columns.

    >>> aligned([("layer", "params"), ("head", "640")])
    ['layer  params', 'head   640']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _total(count: str) -> Any:
    return property(lambda report: sum(getattr(layer, count) for layer in report.counts()))


class Totals(ABC):
    """Base class of reports: sums of the parameters and multiply-accumulates (MACs) of layers, before and after."""

    @abstractmethod
    def counts(self) -> Sequence[Any]:
        """Return objects with the counts of the weight of every layer, under the names of the sums."""

    params_before: int = _total("params_before")
    params: int = _total("params")
    macs_before: int = _total("macs_before")
    macs: int = _total("macs")
