"""Swap the structured layers of a model for dense ones that compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.conversion.replace import describe, has_hooks, layers_of, replace_in
from einlinear.nn import Linear
from einlinear.nn.moe.experts import Stacked


def densify(model: nn.Module) -> ConversionReport:
    """Replace every structured layer by the dense one that computes the same function, in place.

    That is a `torch.nn.Linear`, or what the structured layer took the place of: transformers' Conv1D, or a subclass of
    `torch.nn.Linear` that has no constructor of its own. Layers that share a module or all their factors share their
    weight afterwards. Bias, device, dtype, training mode and requires_grad are kept; a weight is frozen if all its
    factors were.

    Returns:
        What was done to every layer, and what was skipped for which reason, such as hooks, which would be lost.

    Raises:
        ValueError: there is no structured layer inside the model, or none that could be replaced.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 64, "btt"))
        >>> report = el.densify(model)
        >>> report.params_before, report.params
        (1024, 4096)
        >>> model[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    structured = layers_of(model, "layer.to_dense()", lambda m: isinstance(m, Linear))
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    mixtures = [name for name, module in model.named_modules() if isinstance(module, Stacked)]
    skipped = [(name, "is a mixture of experts, which no dense layer computes") for name in mixtures]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    factors = {name: tuple(map(id, layer.weight_parameters())) for name, layer in structured.items()}
    hooked = {factors[name] for name, layer in structured.items() if has_hooks(layer)}
    for name, layer in structured.items():
        if factors[name] in hooked:
            skipped.append((name, "it, or a layer that shares its factors, has hooks, which would be lost"))
        elif id(layer) not in new:
            dense = _dense(layer)
            dense.weight = weights.setdefault(factors[name], dense.weight)
            new[id(layer)] = dense
            s, entries = layer.structure, layer.in_features * layer.out_features
            converted.append(Conversion(name, s.spec, describe(dense), s.params, entries, s.macs, entries))
    return replace_in(model, new, converted, skipped, "there is no structured layer in the model")


def _dense(layer: Linear) -> Any:
    linear = layer.to_dense()
    if issubclass(layer.dense_class, nn.Linear):
        if layer.dense_class.__init__ is nn.Linear.__init__:  # then it has nothing else
            linear.__class__ = layer.dense_class
        return linear
    with torch.device("meta"):  # it gets the parameters of the linear layer
        conv1d: Any = layer.dense_class(layer.out_features, layer.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    conv1d.bias = linear.bias
    return conv1d.train(layer.training)
