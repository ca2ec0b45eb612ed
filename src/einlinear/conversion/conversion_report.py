"""Report of `convert` and `densify`: every matched layer, converted or skipped for a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from einlinear.conversion.coverage import Coverage


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, with aligned columns.

    >>> aligned([("layer", "params"), ("head", "640")])
    ['layer  params', 'head   640']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def total(layers: str, count: str) -> Any:
    """Return a property of a report: the sum of a count over its layers."""
    return property(lambda report: sum(getattr(layer, count) for layer in getattr(report, layers)))


@dataclass(frozen=True)
class Conversion:
    """One converted layer.

    Attributes:
        name: its first qualified name.
        before, after: descriptions of the old and the new layer.
        params_before, params: parameters of the weight, including a router.
        macs_before, macs: multiply-accumulates of the weight for one input vector, including a router.
        error: of a projected weight, relative in Frobenius norm.
        starts_at_zero: whether the dense weight was zero, so that the structured one is zero, too.
    """

    name: str
    before: str
    after: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    error: float | None = None
    starts_at_zero: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """Printable report of a conversion.

    Attributes:
        converted: the layers that were replaced.
        skipped: matched layers that were not replaced, as (name, reason).
        coverage: the share of the model's parameters in the replaced layers, and the kinds of the others; of `convert`.
        params_before, params, macs_before, macs: sums over the converted layers.
    """

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None

    params_before, params = total("converted", "params_before"), total("converted", "params")
    macs_before, macs = total("converted", "macs_before"), total("converted", "macs")

    def __str__(self) -> str:
        rows = [("layer", "before", "after", "params", "MACs", "error")]
        sums = Conversion("total", "", "", self.params_before, self.params, self.macs_before, self.macs)
        for c in (*self.converted, sums):
            error = "" if c.error is None else f"{c.error:.3g}"
            params, macs = f"{c.params_before:,} -> {c.params:,}", f"{c.macs_before:,} -> {c.macs:,}"
            rows.append((c.name, c.before, c.after, params, macs, error))
        lines = [*aligned(rows), *(f"skipped {name}: {reason}" for name, reason in self.skipped)]
        if zero := [c.name for c in self.converted if c.starts_at_zero]:
            lines.append(f"These weights were zero and still are, and biases were kept: {', '.join(zero)}.")
        if self.coverage is not None:
            lines = [*([self.coverage.warning] if self.coverage.warning else []), *lines, *self.coverage.notes]
        return "\n".join(lines)
