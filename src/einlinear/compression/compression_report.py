"""What `compress` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.conversion.coverage import Coverage
from einlinear_lab.pretrained.speed import MANY, SpeedUp

ENOUGH = 10.0  # tokens for each input feature
_NAMED = 5  # slow layers that are named
HEADINGS = (
    "layer",
    "structure",
    "params",
    "MACs",
    "kept",
    "expected error",
    "error",
    "x as fast, 1 token",
    f"{MANY} tokens",
)


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
        speed_up_one: the same for a single token.
        tokens_per_input: how many tokens it was fitted to, for each of its input features; None without any.
        reason: why it had to stay dense; None if it was compressed, or could have been.
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
    speed_up_one: float
    tokens_per_input: float | None = None
    reason: str | None = None

    @property
    def is_slower(self) -> bool:
        """Whether it is slower than the dense layer was, for one token or for 256."""
        return SpeedUp(self.speed_up_one, self.speed_up).is_slower


@dataclass(frozen=True)
class CompressionReport:
    """What became of the layers of a model. Print it.

    Attributes:
        layers: all that were considered.
        skipped: the other linear layers, as (name, reason).
        coverage: which share of the model's parameters was considered, and what kinds of others there are.
        missed: the budget, if it was not reached because only layers that are faster were wanted; else None.
    """

    layers: tuple[Compressed, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None
    missed: float | None = None

    @property
    def params_before(self) -> int:
        return sum(layer.params_before for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def warning(self) -> str | None:
        """A sentence to print first if the layers considered are less than half of the model."""
        return None if self.coverage is None else self.coverage.warning

    @property
    def notes(self) -> list[str]:
        """What else there is to say: what was left out, and why; where there was little data."""
        said = []
        if self.coverage is not None:
            kept = 1 - (self.params_before - self.params) / max(self.coverage.params, 1)
            said += [*self.coverage.notes, f"The whole model keeps {kept:.1%} of its parameters."]
        if self.missed is not None:
            said.append(
                f"The budget of {self.missed:.1%} is not reached: what else was tried is slower than the dense layers."
            )
        said += [f"Stays dense: {layer.name}, {layer.reason}." for layer in self.layers if layer.reason is not None]
        said += [f"Left as it was: {name} {reason}." for name, reason in self.skipped]
        few = [layer.tokens_per_input for layer in self.layers if layer.tokens_per_input is not None]
        few = [each for each in few if each < ENOUGH]
        if few:
            said.append(
                f"{len(few)} of {len(self.layers)} layers were fitted to fewer than {ENOUGH:.0f} tokens for each of "
                f"their inputs ({min(few):.2g} at worst): with more calibration data less is lost."
            )
        if slow := [layer for layer in self.layers if layer.is_slower]:
            named = [f"{layer.name} ({layer.speed_up_one:.2f}, {layer.speed_up:.2f})" for layer in slow[:_NAMED]]
            more = f" and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
            said.append(
                f"{len(slow)} of {len(self.layers)} layers are slower than dense, for 1 token or {MANY}: "
                f"{', '.join(named)}{more}. only_if_faster=True (--only-if-faster) leaves such layers dense."
            )
        return said

    def rows(self) -> list[tuple[str, ...]]:
        """A row of text per layer, and one for all of them, under `HEADINGS`."""
        rows = []
        for layer in self.layers:
            counts = (f"{layer.params:,}", f"{layer.macs:,}", f"{layer.params / layer.params_before:.1%}")
            errors = (f"{layer.expected:.3g}", f"{layer.error:.3g}")
            speeds = (f"{layer.speed_up_one:.2f}", f"{layer.speed_up:.2f}")
            rows.append((layer.name, layer.structure, *counts, *errors, *speeds))
        total = (f"{self.params:,}", f"{self.macs:,}", f"{self.params / self.params_before:.1%}")
        return [*rows, ("all of them", "", *total, "", "", "", "")]

    def __str__(self) -> str:
        rows = [HEADINGS, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*([self.warning] if self.warning else []), *lines, *self.notes])
