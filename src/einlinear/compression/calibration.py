"""Calibration: statistics of the inputs of a model's layers on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import nn

from einlinear.compression.activations import Stage, tokens_of
from einlinear.compression.passes import Passes
from einlinear.compression.second_moments import InputStatistics, SecondMomentAccumulator
from einlinear.compression.selection import Selection
from einlinear.nn.layer_kinds import features
from einlinear.nn.model_call import Batch

# bytes of second moments that are collected in one pass over the data
MEMORY = 2**31


class Calibration:
    """A model on its calibration data.

    Args:
        model: as it was trained.
        selection: of its layers.
        batches: see `einlinear.nn.model_call.call`; None: inputs are unknown, and all directions count alike.
        progress: called with how many batches of how many were run for the inputs of some layers.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        batches: Sequence[Batch] | None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self._batches, self._progress = batches, progress
        self.layers, self.stages = selection.layers, selection.stages
        self._passes = self.passes(model)

    def passes(self, model: nn.Module) -> Passes:
        """Return forward passes of another model on the same data."""
        return Passes(model, self._batches or ())

    def statistics(
        self, stages: Sequence[Stage], compressed: Passes | None = None
    ) -> Iterator[tuple[str, Callable[[], InputStatistics]]]:
        """Yield the layers of some stages, each with a function that returns the statistics of its inputs.

        The first such function that is called runs the model, for as many of the stages as fit into `MEMORY`.

        Args:
            stages: some of the model's.
            compressed: passes of the model with some layers replaced: its inputs are paired with the original's.

        Raises:
            ValueError: by the functions, for inputs that are NaN or infinite, or other tokens than the original's.
        """
        if self._batches is None:
            for name in (name for stage in stages for name in stage.names):
                yield (
                    name,
                    partial(InputStatistics.white, features(self.layers[name])[0], self.layers[name].weight.device),
                )
            return
        for group in self._groups(stages, copies=1 if compressed is None else 4):
            collect = cache(partial(self._collect, group, compressed))
            for stage in group:
                for name in stage.names:
                    yield name, partial(self._statistics_of, name, stage, collect)

    def _statistics_of(
        self, name: str, stage: Stage, collect: Callable[[], dict[Stage, SecondMomentAccumulator]]
    ) -> InputStatistics:
        accumulator = collect()[stage]
        try:
            return accumulator.statistics(centred=self.layers[name].bias is not None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _groups(self, stages: Sequence[Stage], copies: int) -> Iterator[list[Stage]]:
        """Groups of stages whose second moments fit into memory together."""
        group: list[Stage] = []
        size = 0
        for stage in stages:
            added = 8 * copies * features(self.layers[stage.names[0]])[0] ** 2
            if group and size + added > MEMORY:
                yield group
                group, size = [], 0
            group.append(stage)
            size += added
        if group:
            yield group

    def _collect(self, stages: Sequence[Stage], compressed: Passes | None) -> dict[Stage, SecondMomentAccumulator]:
        """Run the data once, and accumulate the inputs of the first layer of each stage."""
        assert self._batches is not None
        accumulators = {
            stage: SecondMomentAccumulator(features(layer)[0], layer.weight.device, compressed is not None)
            for stage, layer in ((stage, self.layers[stage.names[0]]) for stage in stages)
        }
        calls = {stage.names[0]: stage.calls for stage in stages}
        originals = self._passes.inputs(calls)
        replaced = None if compressed is None else compressed.inputs(calls)
        for number, batch in enumerate(self._batches):
            self._progress(number, len(self._batches))
            original = next(originals)
            inputs = original if replaced is None else next(replaced)
            for stage, accumulator in accumulators.items():
                name = stage.names[0]
                if name not in original:
                    continue
                place = f"{name}, batch {number} of the calibration data"
                if [x.shape for x in inputs.get(name, ())] != [x.shape for x in original[name]]:
                    raise ValueError(
                        f"{place}: the compressed model sends other tokens to this layer than the original, as where "
                        "experts are chosen. Give sequential=False (--parallel)"
                    )
                try:
                    for x, x_0 in zip(inputs[name], original[name], strict=True):
                        accumulator.add(tokens_of(batch, x), None if compressed is None else tokens_of(batch, x_0))
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
        return accumulators


@contextmanager
def naming_layer(name: str, damping: float) -> Iterator[None]:
    """Name the layer, and what helps, in the message of a numerical failure."""
    try:
        yield
    except (torch.linalg.LinAlgError, ValueError) as error:  # type: ignore[attr-defined]
        advice = f"give more calibration data, or a larger damping than {damping:g}"
        raise ValueError(f"{name} cannot be fitted to its inputs: {error}; {advice}") from error
