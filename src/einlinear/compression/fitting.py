"""Fitting: layers of the chosen structures and precisions whose outputs come closest to those of the dense layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from einlinear.compression.calibration import Calibration, InputStatistics
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.embedding_tables import structured_head
from einlinear.compression.expert_stacks import DenseStack, layer_weight
from einlinear.compression.factor_rounding import round_factors
from einlinear.compression.forward_passes import Passes
from einlinear.compression.narrowing import NarrowCandidate, fit_narrow, in_full_size, narrow_layer
from einlinear.compression.output_metric import OutputMetric, fit_metric, project_in_metric
from einlinear.compression.resume_cache import LayerResults
from einlinear.conversion.replacement import replace_modules, structured_like
from einlinear.nn import Experts
from einlinear.nn.quantized_linear import QuantizedLinear


class FittedLayer(NamedTuple):
    """A structured or narrow layer, its relative squared error, and the number of tokens that it was fitted to."""

    layer: Any
    error: float
    tokens: int


def fit_layers(
    results: LayerResults,
    calibrated: Calibration,
    chosen: Mapping[str, LayerCandidate],
    find_metric: Callable[[str], OutputMetric | None],
    compressed: nn.Module,
    passes: Passes | None,
) -> dict[str, FittedLayer]:
    """Fit a layer for each candidate, by name, and put it into the compressed model, of which these are passes."""
    fitted: dict[str, FittedLayer] = {}
    stages = [stage for stage in calibrated.stages if not chosen.keys().isdisjoint(stage.names)]
    # with passes each layer is fitted to the outputs of those before it, which are compressed already
    for group in [stages] if passes is None else [[stage] for stage in stages]:
        for name, statistics in calibrated.statistics(group, passes):
            if name in chosen:
                old, choice = calibrated.layers[name], chosen[name]
                cached = results.cached(name, len(fitted), statistics)
                compute = partial(_fit, old, choice, results.damping, partial(find_metric, name))
                fitted[name] = cached(choice.label, compute, partial(_fitted_layer, old, choice), tensors=True)
        names = [name for stage in group for name in stage.names if name in fitted]
        new = {name: in_full_size(calibrated.layers[name], fitted[name].layer, chosen[name]) for name in names}
        for name in names:
            if (head := calibrated.tied_heads.get(name)) is not None:
                new[head] = structured_head(new[name], compressed.get_submodule(head))
        replace_modules(compressed, {id(compressed.get_submodule(name)): layer for name, layer in new.items()})
    results.report(len(fitted))
    return fitted


@torch.no_grad()
def _fit(
    old: Any,
    choice: LayerCandidate,
    damping: float,
    get_metric: Callable[[], OutputMetric | None],
    inputs: InputStatistics,
    moment: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a layer, and how close its outputs come to those of the dense one."""
    if isinstance(choice, NarrowCandidate):
        return fit_narrow(old, choice, damping, inputs, moment)
    weight, layer = layer_weight(old), _layer_of(old, choice)
    target, of_inputs = inputs.target_weight(weight, damping), moment if inputs.tokens else None
    metric = fit_metric(inputs, get_metric)
    factors = [target] if choice.spec == "dense" else project_in_metric(layer.structure, target, of_inputs, metric)
    if isinstance(layer, QuantizedLinear):
        layer.store(round_factors(layer.structure, factors, layer.formats, target, of_inputs))
    else:
        for factor, value in zip(layer.structure.factors, factors, strict=True):
            layer.get_parameter(factor.name).copy_(value)
    approximation = layer.dense_weights() if isinstance(layer, Experts) else layer.dense_weight()
    if layer.bias is not None:
        layer.bias.copy_(inputs.corrected_bias(old.bias, weight, approximation))
    return layer.state_dict(), {"error": inputs.relative_error(weight, approximation), "tokens": inputs.tokens}


def _fitted_layer(old: Any, choice: LayerCandidate, record: tuple[dict[str, Tensor], dict[str, Any]]) -> FittedLayer:
    tensors, metadata = record
    layer = _layer_of(old, choice)
    # those that a file holds stay there
    layer.load_state_dict({name: t.to(old.weight.device) for name, t in tensors.items()}, assign=True)
    return FittedLayer(layer, float(metadata["error"]), int(metadata["tokens"]))


def _layer_of(old: Any, choice: LayerCandidate) -> Any:
    if isinstance(choice, NarrowCandidate):
        return narrow_layer(old, choice)
    if isinstance(old, DenseStack):
        return old.structured(choice.spec)
    return structured_like(old, choice.spec, **({"precision": choice.precision} if choice.precision else {}))
