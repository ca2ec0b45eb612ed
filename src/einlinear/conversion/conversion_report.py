"""What `convert` and `densify` did: every layer that was matched, converted or skipped for a reason."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.conversion.coverage import Coverage


@dataclass(frozen=True)
class Conversion:
    """One converted layer.

    Attributes:
        name: its first qualified name.
        before, after: what it was, and what it is.
        params_before, params: of the weight, that of a router included.
        macs_before, macs: the same, for one input vector.
        error: of a projected weight, relative in Frobenius norm.
        starts_at_zero: whether the dense weight was zero, so that the structured one is as well.
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
    """What became of every layer that was matched.

    Attributes:
        converted: the layers that were replaced.
        skipped: those that were not, as (name, reason).
        coverage: which share of the model's parameters the replaced layers held, and what holds the others; of
            `convert`.
    """

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None

    @property
    def params_before(self) -> int:
        return sum(c.params_before for c in self.converted)

    @property
    def params(self) -> int:
        return sum(c.params for c in self.converted)

    @property
    def macs_before(self) -> int:
        return sum(c.macs_before for c in self.converted)

    @property
    def macs(self) -> int:
        return sum(c.macs for c in self.converted)

    def __str__(self) -> str:
        rows = [("layer", "before", "after", "params", "MACs", "error")]
        for c in self.converted:
            error = "" if c.error is None else f"{c.error:.3g}"
            params, macs = f"{c.params_before:,} -> {c.params:,}", f"{c.macs_before:,} -> {c.macs:,}"
            rows.append((c.name, c.before, c.after, params, macs, error))
        total_params = f"{self.params_before:,} -> {self.params:,}"
        rows.append(("total", "", "", total_params, f"{self.macs_before:,} -> {self.macs:,}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        zero = [c.name for c in self.converted if c.starts_at_zero]
        if zero:
            lines.append(f"These weights were zero and still are, and biases were kept: {', '.join(zero)}.")
        if self.coverage is not None:
            lines = [*([self.coverage.warning] if self.coverage.warning else []), *lines, *self.coverage.notes]
        return "\n".join(lines)
