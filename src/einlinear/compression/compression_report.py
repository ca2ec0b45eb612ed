"""Report of a compression, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from einlinear.compression.timing import MANY, SpeedUp
from einlinear.conversion.conversion_report import aligned, total
from einlinear.conversion.coverage import Coverage

# tokens for each input feature that are enough to fit a layer
_ENOUGH = 10.0
# slow layers that are listed by name
_LISTED = 5
_NAMES = "layer", "structure", "params", "MACs", "kept", "expected error", "error", "x as fast, 1 token"
HEADINGS = (*_NAMES, f"{MANY} tokens")


@dataclass(frozen=True)
class CompressedLayer:
    """One layer.

    Attributes:
        name: qualified.
        structure: its new spec; "dense" if it stayed as it was.
        params_before, params, macs: of the weight; dense has as many MACs as parameters.
        expected_error: the error by which the structure was chosen.
        error: of its outputs on the calibration data, E|y - y'|^2 / E|y|^2 with the means taken out if there is a bias;
            of its weight without calibration.
        sensitivity: how far the model's output moves, for each unit of a small error.
        speed_up: over the dense layer, for one token and for 256 at once.
        tokens_per_input: tokens that it was fitted to, for each input feature; None if it was fitted to none.
        reason: why it had to stay dense; None if it was compressed, or could have been.
    """

    name: str
    structure: str
    params_before: int
    params: int
    macs: int
    expected_error: float
    error: float
    sensitivity: float
    speed_up: SpeedUp = field(default_factory=SpeedUp)
    tokens_per_input: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class CompressionReport:
    """Result of a compression. Print it.

    Attributes:
        layers: all that were considered.
        skipped: the other linear layers, as (name, reason).
        coverage: the share of the model's parameters that was considered, and the kinds of the others.
        missed_budget: the budget, if it was not reached because only faster layers were wanted; else None.
        params_before, params, macs: sums over the weights of the layers.
    """

    layers: tuple[CompressedLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None
    missed_budget: float | None = None

    params_before, params = total("layers", "params_before"), total("layers", "params")
    macs = total("layers", "macs")

    @property
    def warning(self) -> str | None:
        """A sentence to print first if the layers considered are less than half of the model."""
        return None if self.coverage is None else self.coverage.warning

    @property
    def notes(self) -> list[str]:
        """Sentences on coverage, on layers that stayed dense, on scarce data and on slow layers."""
        notes = []
        if self.coverage is not None:
            kept = 1 - (self.params_before - self.params) / max(self.coverage.params, 1)
            notes += [*self.coverage.notes, f"The whole model keeps {kept:.1%} of its parameters."]
        if self.missed_budget is not None:
            notes.append(
                f"The budget of {self.missed_budget:.1%} is not reached: all other structures tried are slower than "
                "the dense layers."
            )
        notes += [f"Stays dense: {layer.name}, {layer.reason}." for layer in self.layers if layer.reason is not None]
        notes += [f"Left as it was: {name} {reason}." for name, reason in self.skipped]
        tokens = [layer.tokens_per_input for layer in self.layers if layer.tokens_per_input is not None]
        if few := [count for count in tokens if count < _ENOUGH]:
            notes.append(
                f"{len(few)} of {len(self.layers)} layers were fitted to fewer than {_ENOUGH:.0f} tokens for each of "
                f"their inputs ({min(few):.2g} at worst): with more calibration data less is lost."
            )
        if slow := [layer for layer in self.layers if layer.speed_up.is_slower]:
            names = ", ".join(
                f"{layer.name} ({layer.speed_up.one_token:.2f}, {layer.speed_up.many_tokens:.2f})"
                for layer in slow[:_LISTED]
            )
            more = f" and {len(slow) - _LISTED} more" if len(slow) > _LISTED else ""
            notes.append(
                f"{len(slow)} of {len(self.layers)} layers are slower than dense, for 1 token or {MANY}: "
                f"{names}{more}. only_if_faster=True (--only-if-faster) leaves such layers dense."
            )
        return notes

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text per layer, and one for all of them, under `HEADINGS`."""
        rows = []
        for layer in self.layers:
            counts = (f"{layer.params:,}", f"{layer.macs:,}", f"{layer.params / layer.params_before:.1%}")
            errors = (f"{layer.expected_error:.3g}", f"{layer.error:.3g}")
            speeds = (f"{layer.speed_up.one_token:.2f}", f"{layer.speed_up.many_tokens:.2f}")
            rows.append((layer.name, layer.structure, *counts, *errors, *speeds))
        sums = (f"{self.params:,}", f"{self.macs:,}", f"{self.params / self.params_before:.1%}")
        return [*rows, ("all of them", "", *sums, "", "", "", "")]

    def __str__(self) -> str:
        rows = [HEADINGS, *self.rows()]
        return "\n".join([*([self.warning] if self.warning else []), *aligned(rows), *self.notes])
