"""Layer sensitivity: how much an error of a layer's outputs changes the model's output.

It is measured with low-rank approximations of the layer; estimates from gradients are up to tenfold too high.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from einlinear.compression.activations import ModelOutput, hooked, model_output
from einlinear.compression.calibration import InputStatistics
from einlinear.compression.divergence import slices, summed_kl_divergence
from einlinear.compression.expert_stacks import DenseStack, layer_weight
from einlinear.compression.forward_passes import Passes
from einlinear.compression.spectrum import LowRanks
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
_TOKENS_TO_MEASURE_CHANGE = 256

UNKNOWN = Sensitivity(((1.0, 1.0),))


@torch.no_grad()
def measure_sensitivity(
    layer: Any,
    probe: SensitivityProbe,
    components: Callable[[InputStatistics, Tensor], LowRanks],
    statistics: InputStatistics,
    moment: Tensor,
) -> Sequence[tuple[float, float]]:
    """Replace a layer by low-rank approximations, given its components, and return the points of its sensitivity."""
    weight, points = layer_weight(layer), []
    after, before, _ = (tensor.to(weight.dtype) for tensor in components(statistics, moment))
    for share in _SHARES:
        rank, shift = int(share * math.prod(weight.shape[-2:]) / sum(weight.shape[-2:])), None
        approximation = after[..., :rank] @ before[..., :rank, :]
        if getattr(layer, "bias", None) is not None:
            shift = statistics.corrected_bias(layer.bias, weight, approximation) - layer.bias
        # a weight of zeros has no error
        if (error := statistics.relative_error(weight, approximation)) > 0:
            points.append((error, probe.output_change(layer, approximation - weight, shift)))
    if not points:
        return [(1.0, 0.0)]
    # inputs that are zero on all the data are no reason to give the layer up
    return points if any(change > 0 for _, change in points) else UNKNOWN.points


class SensitivityProbe:
    """Outputs of the original model on calibration data, and their distance to those of a changed model.

    Output heads that are tied to tables change with them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], tied_heads: Mapping[str, str] | None = None) -> None:
        # those that were run, with as many samples as are enough
        self._model, self._batches = model, list(batches)
        self._run, self._originals = set[int](), dict[int, ModelOutput]()
        # the blocks before a layer are not run again
        self._passes = Passes(model, self._batches)
        self._names = {id(layer): name for name, layer in model.named_modules()}
        self._tied_heads = tied_heads or {}

    @torch.no_grad()
    def output_change(self, layer: nn.Module, weight_change: Tensor, bias_change: Tensor | None) -> float:
        """Return the mean KL divergence of logits, or relative squared error of other outputs, if a layer changes."""
        calls = tokens = 0

        def add_change(name: str, x: Tensor, output: Tensor) -> Tensor:
            nonlocal calls, tokens
            if name:
                return output + F.linear(x, weight_change.to(x))
            calls, tokens = calls + (x.numel() > 0), tokens + output.shape[:-1].numel()
            if isinstance(layer, DenseStack):
                return output + layer.multiply(x, weight_change.to(x))
            if isinstance(layer, nn.Embedding):
                return output + F.embedding(x, weight_change.to(output))
            return output + F.linear(x, weight_change.to(x), None if bias_change is None else bias_change.to(x))

        layers = {"": layer}
        if (tied := self._tied_heads.get(self._names[id(layer)])) is not None:
            layers[tied] = self._model.get_submodule(tied)
        changed = partial(hooked, layers, add_change)
        self._skip_to(layer)
        total = size = 0.0
        reached = 0
        for number in range(len(self._batches)):
            original, before = self._original(number), calls
            with self._passes.resumed(number), changed():
                values = original.values_of(self._model, self._batches[number])
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
            if reached == 2 or tokens >= _TOKENS_TO_MEASURE_CHANGE:
                break
        change = total / max(size, 1e-30)
        # NaN and infinity count as a large change
        return min(change, 1e6) if math.isfinite(change) else 1e6

    def _skip_to(self, layer: nn.Module) -> None:
        original = self._original(0)
        self._passes.skip_to([self._names[id(layer)]], lambda: original.values_of(self._model, self._batches[0]))

    def _original(self, number: int) -> ModelOutput:
        if number not in self._run:
            self._run.add(number)
            self._batches[number] = _first_samples(self._model, self._batches[number])
        output = self._originals.get(number) or model_output(self._model, self._batches[number])
        # larger ones are computed again
        if output.values.nbytes <= 2**26:
            self._originals[number] = output
        return output


def _first_samples(model: nn.Module, batch: Batch) -> Batch:
    """Return the first samples of a batch with enough tokens, or all if the model's output for these depends on others.

    Samples are the first dimension of all tensors.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    size = len(tensors[0]) if tensors and tensors[0].dim() else 0
    if any(not tensor.dim() or len(tensor) != size for tensor in tensors):
        return batch
    whole = model_output(model, batch)
    first = -(-_TOKENS_TO_MEASURE_CHANGE * size // max(len(whole.values), 1))
    if first >= size:
        return batch
    part = tree_map_only(Tensor, lambda tensor: tensor[:first], batch)
    # a model may raise anything for a batch that it does not take
    with suppress(Exception):
        values = model_output(model, part).values
        expected = whole.values[: len(values)]
        if float((values - expected).norm()) <= 3e-2 * float(expected.norm()):
            return part
    return batch
