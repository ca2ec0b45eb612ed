"""Fitting: structured layers whose outputs come closest to those of the dense layers in whose place they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.compression.calibration import Calibration, naming_layer
from einlinear.compression.resume_cache import ResumeCache
from einlinear.compression.second_moments import InputStatistics
from einlinear.compression.selection import weight_of
from einlinear.conversion.replacement import put, structured_like
from einlinear.nn import Linear


@dataclass(frozen=True)
class FittedLayer:
    """A structured layer, the relative squared error of its outputs, and how many tokens it was fitted to."""

    layer: Linear
    error: float
    tokens: int


def fit_layers(
    calibration: Calibration,
    model: nn.Module,
    structures: Mapping[str, str],
    damping: float,
    sequential: bool,
    cache: ResumeCache,
    progress: Callable[[int], None],
) -> dict[str, FittedLayer]:
    """Fit layers with the structures of these specs, and put them into `model`, a copy of the original.

    Args:
        sequential: each layer is fitted to the outputs of those before it, which are compressed already.
        progress: called with the number of layers that are done.
    """
    fitted: dict[str, FittedLayer] = {}

    @torch.no_grad()
    def compute(name: str, statistics: Callable[[], InputStatistics]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        progress(len(fitted))
        inputs, old = statistics(), calibration.layers[name]
        weight, layer = weight_of(old), structured_like(old, structures[name])
        with naming_layer(name, damping):
            target = inputs.target_weight(weight, damping)
            factors = ops.project(layer.structure, target, inputs.damped(damping) if inputs.tokens else None)
            for factor, value in zip(layer.structure.factors, factors, strict=True):
                layer.get_parameter(factor.name).copy_(value)
            approximation = layer.dense_weight()
            if layer.bias is not None:
                layer.bias.copy_(inputs.corrected_bias(old.bias, weight, approximation))
            error = inputs.relative_error(weight, approximation)
        return layer.state_dict(), {"error": error, "tokens": inputs.tokens}

    def decode(name: str, record: tuple[dict[str, Tensor], dict[str, Any]]) -> FittedLayer:
        tensors, facts = record
        layer = structured_like(calibration.layers[name], structures[name])
        layer.load_state_dict(tensors)
        return FittedLayer(layer, float(facts["error"]), int(facts["tokens"]))

    stages = [stage for stage in calibration.stages if not structures.keys().isdisjoint(stage.names)]
    passes = calibration.passes(model) if sequential else None
    for group in [[stage] for stage in stages] if sequential else [stages]:
        for name, statistics in calibration.statistics(group, passes):
            if name in structures:
                key = f"{name} as {structures[name]}"
                fitted[name] = cache.get_or(
                    key, partial(compute, name, statistics), partial(decode, name), tensors=True
                )
        put(model, {id(model.get_submodule(n)): fitted[n].layer for stage in group for n in stage.names if n in fitted})
    progress(len(fitted))
    return fitted
