"""Layer sensitivity: how much an error of a layer's outputs changes the model's output. Measured, not derived.

Low-rank approximations of the layer stand for all structures: only the size of the error counts. First-order estimates,
from gradients, take errors for small and ignore their direction: in all-MiniLM-L6-v2 they overestimate attention's
value projections up to tenfold.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear import ops
from einlinear.compression.activations import hooked, output_of, tokens_of
from einlinear.compression.kl_divergence import slices, summed_kl_divergence
from einlinear.compression.second_moments import InputStatistics
from einlinear.compression.selection import weight_of
from einlinear.compression.tracing import ModelOutput, head_inputs, model_output
from einlinear.nn.layer_kinds import features
from einlinear.nn.model_call import Batch, call
from einlinear.structures import structure

# fractions of the dense parameters that the low-rank approximations keep
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
# batches that call the layer and are run for one measurement
_BATCHES = 2
# bytes of an output that is kept; larger ones are computed again
_KEPT_BYTES = 2**26
# change of an output that is not finite
_NOT_FINITE = 1e6


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the model's output to the error of one layer.

    Attributes:
        points: (relative squared error of the layer, change of the model's output), errors increasing; at least one.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Sensitivity:
        """Build it from points in any order; a larger error never counts less."""
        increasing: list[tuple[float, float]] = []
        for error, change in sorted((float(error), float(change)) for error, change in points):
            if increasing and error <= increasing[-1][0]:
                continue
            increasing.append((error, max(change, increasing[-1][1] if increasing else 0.0)))
        if not increasing:
            raise ValueError("a sensitivity needs at least one point")
        return cls(tuple(increasing))

    def at(self, error: float) -> float:
        """Return the change of the output: between the points by a power law, beyond them in proportion.

        >>> sensitivity = Sensitivity.of([(0.01, 1.0), (0.04, 4.0), (0.16, 64.0)])
        >>> [round(sensitivity.at(error), 6) for error in (0.0, 0.001, 0.02, 0.08, 0.32)]
        [0.0, 0.1, 2.0, 16.0, 128.0]
        """
        right = bisect([e for e, _ in self.points], error)
        low, change = self.points[max(right - 1, 0)]
        if error <= 0 or right in (0, len(self.points)) or change <= 0:
            return change * max(error, 0.0) / low
        high, more = self.points[right]
        power = math.log(more / change) / math.log(high / low)
        return float(change * (error / low) ** power)

    @property
    def slope(self) -> float:
        """Change of the output for each unit of a small error."""
        error, change = self.points[0]
        return change / error


UNKNOWN = Sensitivity(((1.0, 1.0),))
_HARMLESS = Sensitivity(((1.0, 0.0),))


@torch.no_grad()
def measure_sensitivity(
    layer: Any, statistics: InputStatistics, damping: float, probe: SensitivityProbe
) -> Sensitivity:
    """Replace a layer by low-rank approximations, and measure how far each moves the model's output."""
    weight, moment = weight_of(layer), statistics.damped(damping)
    points = []
    for share in SHARES:
        approximation = torch.zeros_like(weight)
        if rank := int(share * weight.numel() / sum(weight.shape)):
            s = structure(f"low_rank(rank={rank})", *features(layer))
            approximation = ops.dense_weight(s, ops.project(s, weight, moment))
        shift = None
        if layer.bias is not None:
            shift = statistics.corrected_bias(layer.bias, weight, approximation) - layer.bias
        # a weight of zeros has no error
        if (error := statistics.relative_error(weight, approximation)) > 0:
            points.append((error, probe.output_change(layer, approximation - weight, shift)))
    if not points:
        return _HARMLESS
    # inputs that are zero on all the data are no reason to give the layer up
    return Sensitivity.of(points) if any(change > 0 for _, change in points) else UNKNOWN


class SensitivityProbe:
    """Output of the original model on some of the calibration data, and its distance to that of a changed model.

    Where a linear layer computes the output, the inputs of that layer are kept, which are much smaller than logits.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._originals: dict[int, ModelOutput] = {}

    @torch.no_grad()
    def output_change(self, layer: nn.Module, weight_change: Tensor, bias_change: Tensor | None) -> float:
        """Return how far the output moves if a layer's weight changes by (out, in) and its bias by (out,).

        For a model with logits it is the KL divergence in nats, for another the relative squared error: the mean over
        the tokens of the first batches, up to the second one that calls the layer.
        """
        calls = 0

        def add_change(_: str, x: Tensor, output: Tensor) -> Tensor:
            nonlocal calls
            calls += x.numel() > 0
            return output + F.linear(x, weight_change.to(x), None if bias_change is None else bias_change.to(x))

        changed = partial(hooked, {"": layer}, add_change)
        total = size = 0.0
        reached = 0
        for number, batch in enumerate(self._batches):
            original = self._original(number)
            before = calls
            with changed():
                values = (
                    tokens_of(batch, output_of(call(self._model, batch)))
                    if original.head is None
                    else head_inputs(self._model, original.head, batch)
                )
            change_of_batch, size_of_batch = self._compare(original, values, changed)
            total, size = total + change_of_batch, size + size_of_batch
            # free both before the next batch is run
            del original, values
            reached += calls > before
            if reached == _BATCHES:
                break
        change = total / max(size, 1e-30)
        return min(change, _NOT_FINITE) if math.isfinite(change) else _NOT_FINITE

    def _compare(
        self, original: ModelOutput, values: Tensor, changed: Callable[[], AbstractContextManager[None]]
    ) -> tuple[float, float]:
        """The distance of the outputs for a batch, summed, and what to divide the sum by."""
        head = nn.Identity() if original.head is None else self._model.get_submodule(original.head)
        change = size = 0.0
        for part in slices(len(original.values), original.features):
            expected = head(original.values[part])
            # the head itself may be the layer that changes
            with changed():
                output = head(values[part])
            if original.is_logits:
                change += summed_kl_divergence(expected, output)
                size += len(expected)
            else:
                change += float((output.float() - expected.float()).square().sum())
                size += float(expected.float().square().sum())
        return change, size

    def _original(self, number: int) -> ModelOutput:
        if number in self._originals:
            return self._originals[number]
        output = model_output(self._model, self._batches[number])
        if output.values.nbytes <= _KEPT_BYTES:
            self._originals[number] = output
        return output
