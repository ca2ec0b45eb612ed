"""Layer sensitivity: how much an error of a layer's outputs changes the model's output.

It is measured with low-rank approximations of the layer; estimates from gradients are up to tenfold too high.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.activations import ModelOutput, hooked, model_output
from einlinear.compression.calibration import InputStatistics
from einlinear.compression.divergence import slices, summed_kl_divergence
from einlinear.compression.output_metric import OutputMetric
from einlinear.compression.spectrum import low_ranks
from einlinear.nn.dense_layers import weight_matrix
from einlinear.nn.model_call import Batch


@dataclass(frozen=True)
class Sensitivity:
    """Points (relative squared error of a layer, change of the model's output), of increasing errors; at least one."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Sensitivity:
        """Build it from points in any order; a larger error never counts less."""
        first, *others = sorted((float(error), float(change)) for error, change in points)
        increasing = [first]
        for error, change in others:
            if error > increasing[-1][0]:
                increasing.append((error, max(change, increasing[-1][1])))
        return cls(tuple(increasing))

    def at(self, error: float) -> float:
        """Return the change of the output: between the points by a power law, beyond them in proportion."""
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


# of the dense parameters
_SHARES = (0.05, 0.25, 0.6)
# tokens after which the change of the output is known well enough
_ENOUGH = 1024

UNKNOWN = Sensitivity(((1.0, 1.0),))


@torch.no_grad()
def measure_sensitivity(
    layer: Any,
    probe: SensitivityProbe,
    metric: Callable[[], OutputMetric | None],
    statistics: InputStatistics,
    moment: Tensor,
) -> Sequence[tuple[float, float]]:
    """Replace a layer by low-rank approximations, and return the points of its sensitivity."""
    weight, points = weight_matrix(layer), []
    after, before, _ = (tensor.to(weight.dtype) for tensor in low_ranks(weight, moment, metric()))
    for share in _SHARES:
        rank, shift = int(share * weight.numel() / sum(weight.shape)), None
        approximation = after[:, :rank] @ before[:rank]
        if layer.bias is not None:
            shift = statistics.corrected_bias(layer.bias, weight, approximation) - layer.bias
        # a weight of zeros has no error
        if (error := statistics.relative_error(weight, approximation)) > 0:
            points.append((error, probe.output_change(layer, approximation - weight, shift)))
    if not points:
        return [(1.0, 0.0)]
    # inputs that are zero on all the data are no reason to give the layer up
    return points if any(change > 0 for _, change in points) else UNKNOWN.points


class SensitivityProbe:
    """Outputs of the original model on calibration data, and their distance to those of a changed model."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._originals: dict[int, ModelOutput] = {}

    @torch.no_grad()
    def output_change(self, layer: nn.Module, weight_change: Tensor, bias_change: Tensor | None) -> float:
        """Return the mean KL divergence of logits, or relative squared error of other outputs, if a layer changes."""
        calls = tokens = 0

        def add_change(_: str, x: Tensor, output: Tensor) -> Tensor:
            nonlocal calls, tokens
            calls, tokens = calls + (x.numel() > 0), tokens + x.shape[:-1].numel()
            return output + F.linear(x, weight_change.to(x), None if bias_change is None else bias_change.to(x))

        changed = partial(hooked, {"": layer}, add_change)
        total = size = 0.0
        reached = 0
        for number, batch in enumerate(self._batches):
            original, before = self._original(number), calls
            with changed():
                values = original.values_of(self._model, batch)
            head = nn.Identity() if original.head is None else self._model.get_submodule(original.head)
            for part in slices(len(original.values), original.features):
                expected = head(original.values[part])
                # the head itself may be the layer that changes
                with changed():
                    output = head(values[part])
                if original.is_logits:
                    total += float(summed_kl_divergence(expected, output))
                    size += len(expected)
                else:
                    total += float((output.float() - expected.float()).square().sum())
                    size += float(expected.float().square().sum())
            # free both before the next batch is run
            del original, values
            reached += calls > before
            # two batches that call the layer are enough, or many tokens
            if reached == 2 or tokens >= _ENOUGH:
                break
        change = total / max(size, 1e-30)
        # NaN and infinity count as a large change
        return min(change, 1e6) if math.isfinite(change) else 1e6

    def _original(self, number: int) -> ModelOutput:
        output = self._originals.get(number) or model_output(self._model, self._batches[number])
        # larger ones are computed again
        if output.values.nbytes <= 2**26:
            self._originals[number] = output
        return output
