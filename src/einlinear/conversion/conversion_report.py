"""Report of `convert` and `densify`: every matched layer, converted or skipped for a reason."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.conversion.coverage import Coverage
from einlinear.conversion.report_tables import Totals, aligned


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
class ConversionReport(Totals):
    """Printable report of a conversion.

    Attributes:
        converted: the layers that were replaced.
        skipped: matched layers that were not replaced, as (name, reason).
        coverage: the share of the model's parameters in the replaced layers, and the kinds of the others; of `convert`.
    """

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None

    def counts(self) -> tuple[Conversion, ...]:
        return self.converted

    def __str__(self) -> str:
        rows = [("layer", "before", "after", "params", "MACs", "error")]
        total = Conversion("total", "", "", self.params_before, self.params, self.macs_before, self.macs)
        for c in (*self.converted, total):
            error = "" if c.error is None else f"{c.error:.3g}"
            params, macs = f"{c.params_before:,} -> {c.params:,}", f"{c.macs_before:,} -> {c.macs:,}"
            rows.append((c.name, c.before, c.after, params, macs, error))
        lines = [*aligned(rows), *(f"skipped {name}: {reason}" for name, reason in self.skipped)]
        if zero := [c.name for c in self.converted if c.starts_at_zero]:
            lines.append(f"These weights were zero and still are, and biases were kept: {', '.join(zero)}.")
        if self.coverage is not None:
            lines = [*([self.coverage.warning] if self.coverage.warning else []), *lines, *self.coverage.notes]
        return "\n".join(lines)
