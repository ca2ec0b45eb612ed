"""What `compress` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

HEADINGS = ("layer", "structure", "params", "MACs", "kept", "expected error", "error", "times as fast")


@dataclass(frozen=True)
class Compressed:
    """One layer.

    Attributes:
        name: qualified.
        structure: what it became; "dense" if it stayed as it was.
        params_before, params, macs: of the weight; dense has as many MACs as parameters.
        expected: the error that the choice was made by.
        error: of its outputs on the calibration data, E|y - y'|^2 / E|y|^2 with the means taken out if there is a bias;
            of its weight without calibration.
        matters: how far the model's output moves, for each unit of a small error; see `effects.py`.
        speed_up: how many times as fast it is as the dense layer was, for 256 tokens at once.
    """

    name: str
    structure: str
    params_before: int
    params: int
    macs: int
    expected: float
    error: float
    matters: float
    speed_up: float


@dataclass(frozen=True)
class CompressionReport:
    """What became of every layer, and of those left out `skipped` as (name, reason). Print it."""

    layers: tuple[Compressed, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def params_before(self) -> int:
        return sum(layer.params_before for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    def rows(self) -> list[tuple[str, ...]]:
        """A row of text per layer, and one for all of them, under `HEADINGS`."""
        rows = []
        for layer in self.layers:
            counts = (f"{layer.params:,}", f"{layer.macs:,}", f"{layer.params / layer.params_before:.1%}")
            errors = (f"{layer.expected:.3g}", f"{layer.error:.3g}")
            rows.append((layer.name, layer.structure, *counts, *errors, f"{layer.speed_up:.2f}"))
        total = (f"{self.params:,}", f"{self.macs:,}", f"{self.params / self.params_before:.1%}")
        return [*rows, ("all of them", "", *total, "", "", "")]

    def __str__(self) -> str:
        rows = [HEADINGS, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped)])
