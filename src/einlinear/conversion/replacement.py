"""Linear layers of a model: found by qualified name, created alike, replaced in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.nn import Linear, MoELinear
from einlinear.nn.layer_kinds import features, is_linear, layer_info
from einlinear.structures import Structure


def layers_of(model: nn.Module, instead: str, is_one: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Return the layers of a kind by every qualified name they have; `instead` is the advice for a bare layer."""
    if is_one(model):
        raise ValueError(f"the model is itself a linear layer, which cannot be replaced in place: use {instead}")
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_one(module)}


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers, structured ones included, by every qualified name they have."""
    return layers_of(
        model,
        "el.Linear.from_dense(layer, structure)",
        lambda module: isinstance(module, Linear | MoELinear) or is_linear(module),
    )


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Return the reasons why parameters with the weights of many experts are skipped, by their qualified names.

    transformers keeps the experts of most mixtures in such a stack, in a class with "Experts" in its name: there is no
    module for one expert that could be replaced.
    """
    return {
        f"{name}.{key}": f"is a stack of {len(weight)} weights of a {type(module).__name__}, which is not supported"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and layer_info(module) is None
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the modules that hold a parameter, with their names, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def structured_like(old: Any, structure: str | Structure, **config: Any) -> Any:
    """Return a structured layer with new weights, and the size, device, dtype and modes of a dense one.

    It is a `Linear`, or a `MoELinear` if `config`, further arguments of its constructor, has "experts".
    """
    weight, bias = old.weight, old.bias
    layer_class = MoELinear if "experts" in config else Linear
    layer = layer_class(
        *features(old), structure, bias=bias is not None, device=weight.device, dtype=weight.dtype, **config
    )
    if isinstance(layer, Linear):
        layer.dense_class = type(old)
    for parameter in layer.parameters():
        parameter.requires_grad_(weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(old.training)


def describe(module: nn.Module) -> str:
    """Return the class and the size of a linear layer as text."""
    return "{} {} -> {}".format(type(module).__name__, *features(module))


def replace_layers(
    model: nn.Module,
    new: Mapping[int, nn.Module],
    converted: Sequence[Conversion],
    skipped: Sequence[tuple[str, str]],
    otherwise: str,
) -> ConversionReport:
    """Put the new modules into the model and report it.

    Raises:
        ValueError: there are none, for the reasons of the skipped layers, or else `otherwise`.
    """
    if not converted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or otherwise
        raise ValueError(f"no layer could be converted: {reasons}")
    put(model, new)
    return ConversionReport(tuple(converted), tuple(skipped))


def put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new modules into all places of the old ones, by the id of the old."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])
