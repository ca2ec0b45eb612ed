"""What an error of a layer's outputs does to what the model puts out: measured, by replacing the layer alone.

Low ranks of it stand for all structures: what counts is how large the error is. First-order estimates, from gradients,
take errors for small and without a direction: in all-MiniLM-L6-v2 those of attention's values came out up to ten times
as harmful as they are.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.divergence import divergence, slices
from einlinear_lab.pretrained.running import Batch, Readout, call, inputs_of, output_of, readout, tokens_of

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)  # of dense, that the low ranks keep
_BATCHES = 2  # of the calibration data that call the layer: so many are run for each
_KEPT = 2**26  # bytes of outputs that are kept; larger ones are computed again
_RUINED = 1e6  # where what the model puts out is no number any more


@dataclass(frozen=True)
class Effect:
    """How far the model's output moves with the error of one layer.

    Attributes:
        points: (relative squared error of the layer, effect), the errors increasing, at least one.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Effect:
        """From points in any order; a larger error never counts less."""
        found: list[tuple[float, float]] = []
        for error, effect in sorted(points):
            if found and error <= found[-1][0]:
                continue
            found.append((error, max(effect, found[-1][1] if found else 0.0)))
        return cls(tuple(found))

    def at(self, error: float) -> float:
        """Between the points by a power law; beyond them in proportion.

        >>> effect = Effect.of([(0.01, 1.0), (0.04, 4.0), (0.16, 64.0)])
        >>> [round(effect.at(error), 6) for error in (0.0, 0.001, 0.02, 0.08, 0.32)]
        [0.0, 0.1, 2.0, 16.0, 128.0]
        """
        errors = [own for own, _ in self.points]
        right = bisect(errors, error)
        (e, effect) = self.points[max(right - 1, 0)]
        if error <= 0 or right in (0, len(errors)) or effect <= 0:
            return effect * max(error, 0.0) / e
        (e2, effect2) = self.points[right]
        power = math.log(effect2 / effect) / math.log(e2 / e)
        return float(effect * (error / e) ** power)

    @property
    def slope(self) -> float:
        """What a small error counts, for each unit."""
        error, effect = self.points[0]
        return effect / error


class Outputs:
    """What the model puts out on some of the calibration data, to compare with.

    Where a linear layer puts it out, its inputs are kept, which are much smaller than logits.

    Args:
        model: the original.
        batches: the calibration data.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._right: dict[int, Readout] = {}  # by the batch

    @torch.no_grad()
    def moved(self, layer: nn.Module, change: Tensor, shift: Tensor | None) -> float:
        """How far the output moves if a layer's weight changes by (out, in) and its bias by (out,).

        The divergence of the answers of a model that puts out logits, in nats; of another, the share of the squared
        outputs. It is the mean over the tokens of the first batches, of so many that two of them call the layer.
        """
        calls = 0

        def changed(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            nonlocal calls
            x = args[0] if args else next(iter(kwargs.values()))
            calls += x.numel() > 0
            more = F.linear(x, change.to(x), None if shift is None else shift.to(x))
            return output + more

        @contextmanager
        def changing() -> Iterator[None]:
            handle = layer.register_forward_hook(changed, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

        total = count = 0.0
        reached = 0
        for number, batch in enumerate(self._batches):
            right = self._right_of(number)
            before = calls
            with changing():
                found = self._values(batch, right.head)
            change_of_batch, size = self._compare(right, found, changing)
            total, count = total + change_of_batch, count + size
            del right, found  # before the next batch is run
            reached += calls > before
            if reached == _BATCHES:
                break
        moved = total / max(count, 1e-30)
        return min(moved, _RUINED) if math.isfinite(moved) else _RUINED

    def _compare(
        self, right: Readout, found: Tensor, changing: Callable[[], AbstractContextManager[None]]
    ) -> tuple[float, float]:
        """How far apart the outputs for a batch are, summed, and what to divide by."""
        change = size = 0.0
        for part in slices(len(right.values), right.features):
            expected = self._outputs(right.values[part], right.head)
            with changing():  # it may be the head that changes
                outputs = self._outputs(found[part], right.head)
            if right.is_logits:
                change += divergence(expected, outputs)
                size += len(expected)
            else:
                change += float((outputs.float() - expected.float()).square().sum())
                size += float(expected.float().square().sum())
        return change, size

    def _right_of(self, number: int) -> Readout:
        if number in self._right:
            return self._right[number]
        right = readout(self._model, self._batches[number])
        if right.values.nbytes <= _KEPT:
            self._right[number] = right
        return right

    def _values(self, batch: Batch, head: str | None) -> Tensor:
        """(tokens, features): the outputs, or the inputs of the head."""
        if head is None:
            return tokens_of(batch, output_of(call(self._model, batch)))
        ((x,),) = inputs_of(self._model, {head: self._model.get_submodule(head)}, batch, {head: 1}).values()
        return tokens_of(batch, x)

    def _outputs(self, values: Tensor, head: str | None) -> Tensor:
        outputs: Tensor = values if head is None else self._model.get_submodule(head)(values)
        return outputs
