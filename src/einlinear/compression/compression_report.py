"""Report of a compression, layer by layer, and speed of structured layers beside the dense ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.compression.selection import weight_of
from einlinear.conversion.conversion_report import Coverage, aligned, total
from einlinear.nn import Linear
from einlinear.nn.layer_kinds import features

# tokens of a large batch
_MANY = 256
# calls of each layer, and seconds of both after which no more calls are needed
_LEAST, _MOST, _ENOUGH = 6, 60, 0.1
# of the dense layer's speed, by which timings may be off
_NOISE = 0.95
# tokens for each input feature that are enough to fit a layer
_FEW = 10.0
# slow layers that are listed by name
_LISTED = 5
_NAMES = "layer", "structure", "params", "MACs", "kept", "expected error", "error", "x as fast, 1 token"
HEADINGS = (*_NAMES, f"{_MANY} tokens")


@dataclass(frozen=True)
class SpeedUp:
    """Speed of a new layer over that of an old one, for one token and for 256 at once."""

    one_token: float = 1.0
    many_tokens: float = 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the new layer is slower in either case, by more than timings are off."""
        return min(self.one_token, self.many_tokens) < _NOISE


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
        if few := [count for count in tokens if count < _FEW]:
            notes.append(
                f"{len(few)} of {len(self.layers)} layers were fitted to fewer than {_FEW:.0f} tokens for each of "
                f"their inputs ({min(few):.2g} at worst): with more calibration data less is lost."
            )
        if slow := [layer for layer in self.layers if layer.speed_up.is_slower]:
            names = ", ".join(
                f"{layer.name} ({layer.speed_up.one_token:.2f}, {layer.speed_up.many_tokens:.2f})"
                for layer in slow[:_LISTED]
            )
            more = f" and {len(slow) - _LISTED} more" if len(slow) > _LISTED else ""
            notes.append(
                f"{len(slow)} of {len(self.layers)} layers are slower than dense, for 1 token or {_MANY}: "
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


@torch.no_grad()
def speed_up(old: nn.Module, new: nn.Module) -> SpeedUp:
    """Time the forward passes of two linear layers with the same device and dtype."""
    like = next(new.parameters())
    x = torch.randn(_MANY, features(old)[0], generator=torch.Generator().manual_seed(0)).to(like)
    return SpeedUp(*(_ratio(partial(old, part), partial(new, part), like.device) for part in (x[:1], x)))


class LayerTimer:
    """Speed-ups of structured layers, timed once for each structure, size and dtype."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._speed_ups: dict[tuple[object, ...], SpeedUp] = {}

    def __call__(self, old: Any, new: Linear) -> SpeedUp:
        key = (new.structure.spec, *weight_of(old).shape, old.weight.dtype, old.weight.device, old.bias is None)
        if key not in self._speed_ups:
            self._progress(len(self._speed_ups))
            self._speed_ups[key] = speed_up(old, new)
        return self._speed_ups[key]


def _ratio(old: Callable[[], object], new: Callable[[], object], device: torch.device) -> float:
    seconds: dict[Callable[[], object], list[float]] = {old: [], new: []}
    while len(seconds[old]) < _LEAST or (len(seconds[old]) < _MOST and sum(map(sum, seconds.values())) < _ENOUGH):
        for run, times in seconds.items():
            times.append(seconds_of(run, device))
    return min(seconds[old]) / min(seconds[new])


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, until the device has finished it."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
