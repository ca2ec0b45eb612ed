"""What `convert` and `densify` did: every layer that was matched, converted or skipped for a reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversion:
    """One converted layer. `params` and `macs` are those of the weight; `error` is relative, in Frobenius norm."""

    name: str
    before: str
    after: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    error: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What became of every layer that was matched: `converted`, and `skipped` as (name, reason)."""

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()

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
        return "\n".join(lines)
