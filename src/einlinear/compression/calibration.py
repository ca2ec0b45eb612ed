"""What calibration data say of the layers of a model: moments of their inputs, and whether its output needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from einlinear.compression.passes import Passes
from einlinear.compression.second_moments import Inputs, Moments
from einlinear.compression.sensitivity import Outputs
from einlinear.nn.third_party import features
from einlinear_lab.pretrained.running import Batch, Stage, Trace, stages_of, tokens_of, trace

MEMORY = 2**31  # bytes of moments that are collected in one pass over the data


class Calibration:
    """A model on its calibration data.

    Args:
        model: as it was trained.
        layers: linear ones, by qualified name.
        batches: see `running.call`; None: nothing is known of the inputs, and all directions count alike.
        progress: called with how many batches of how many were run for the inputs of some layers.

    Attributes:
        stages: the layers that are called, in order, those of one input together.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        batches: Sequence[Batch] | None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self._progress = progress
        self._model, self._batches, self.layers = model, batches, layers
        self._passes = self.passes(model)
        self.stages = [Stage((name,), 1) for name in layers] if batches is None else stages_of(model, layers, batches)

    def passes(self, model: nn.Module) -> Passes:
        """Of another model on the same data."""
        return Passes(model, self._batches or ())

    def inputs(self, stages: Sequence[Stage], compressed: Passes | None = None) -> Iterator[tuple[str, Inputs]]:
        """What is known of the inputs of the layers of some stages, layer by layer.

        Args:
            stages: some of the model's.
            compressed: of the model with some of its layers replaced: then its inputs are meant, beside the original's.

        Raises:
            ValueError: inputs that are NaN or infinite, or other tokens than the original's; names the layer.
        """
        if self._batches is None:
            for stage in stages:
                for name in stage.names:
                    yield name, Inputs.white(features(self.layers[name])[0], self.layers[name].weight.device)
            return
        for part in self._parts(stages, copies=1 if compressed is None else 3):
            for stage, moments in zip(part, self._moments(part, compressed), strict=True):
                for name in stage.names:
                    try:
                        inputs = moments.inputs(centred=self.layers[name].bias is not None)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
                    yield name, inputs

    @cached_property
    def outputs(self) -> Outputs | None:
        """What the model puts out; None without data."""
        return None if self._batches is None else Outputs(self._model, self._batches)

    def trace(self) -> Trace:
        """What the data do in the model; without data, the output depends on all layers."""
        if self._batches is None:
            every = frozenset(self.layers)
            return Trace(every, every, frozenset())
        return trace(self._model, self.layers, self._batches)

    def _parts(self, stages: Sequence[Stage], copies: int) -> Iterator[list[Stage]]:
        """Stages whose moments fit into memory together."""
        part: list[Stage] = []
        size = 0
        for stage in stages:
            own = 8 * copies * features(self.layers[stage.names[0]])[0] ** 2
            if part and size + own > MEMORY:
                yield part
                part, size = [], 0
            part.append(stage)
            size += own
        if part:
            yield part

    def _moments(self, stages: Sequence[Stage], compressed: Passes | None) -> list[Moments]:
        assert self._batches is not None
        calls = {stage.names[0]: stage.calls for stage in stages}  # one layer for all of a stage
        found = {
            name: Moments(features(self.layers[name])[0], self.layers[name].weight.device, compressed is not None)
            for name in calls
        }
        originals = self._passes.inputs(calls)
        nows = originals if compressed is None else compressed.inputs(calls)
        for number, batch in enumerate(self._batches):
            self._progress(number, len(self._batches))
            original = next(originals)
            now = original if compressed is None else next(nows)
            for name, xs in original.items():
                where = f"{name}, batch {number} of the calibration data"
                if [x.shape for x in now.get(name, ())] != [x.shape for x in xs]:
                    raise ValueError(
                        f"{where}: the compressed model sends other tokens there than the original, as where experts "
                        "are chosen. Give sequential=False (--parallel)"
                    )
                try:
                    for x, before in zip(now[name], xs, strict=True):
                        found[name].add(tokens_of(batch, x), None if compressed is None else tokens_of(batch, before))
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
        return list(found.values())
