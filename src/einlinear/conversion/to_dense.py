"""Conversion of structured layers back to dense ones with the same function."""

from __future__ import annotations

from typing import Any

from torch import nn

from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.conversion.eligibility import has_hooks
from einlinear.conversion.linear_layers import describe, layers_of, replace_layers
from einlinear.nn import Linear
from einlinear.nn.moe.experts import ExpertStack
from einlinear.nn.third_party import as_class


def densify(model: nn.Module) -> ConversionReport:
    """Replace every structured layer by the dense one that computes the same function, in place.

    The dense layer is a `torch.nn.Linear`, or of the class that the structured layer replaced: transformers' Conv1D, or
    a subclass of `torch.nn.Linear` without a constructor of its own. Layers that share a module or all their factors
    share their weight afterwards. Bias, device, dtype, training mode and requires_grad are kept; a weight is frozen if
    all its factors were.

    Returns:
        A report on every layer, converted or skipped for a reason, such as hooks, which would be lost.

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
    mixtures = [name for name, module in model.named_modules() if isinstance(module, ExpertStack)]
    skipped = [(name, "is a mixture of experts, which no dense layer computes") for name in mixtures]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    factors = {name: tuple(map(id, layer.weight_parameters())) for name, layer in structured.items()}
    hooked = {factors[name] for name, layer in structured.items() if has_hooks(layer)}
    for name, layer in structured.items():
        if factors[name] in hooked:
            skipped.append((name, "it, or a layer that shares its factors, has hooks, which would be lost"))
        elif id(layer) not in new:
            dense: Any = as_class(layer.to_dense(), layer.dense_class)
            dense.weight = weights.setdefault(factors[name], dense.weight)
            new[id(layer)] = dense
            s, entries = layer.structure, layer.in_features * layer.out_features
            converted.append(Conversion(name, s.spec, describe(dense), s.params, entries, s.macs, entries))
    return replace_layers(model, new, converted, skipped, "there is no structured layer in the model")
