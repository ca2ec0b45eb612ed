"""Which layers of a model could become structured ones, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import nn

from einlinear.conversion.replace import has_hooks, layers_of
from einlinear.nn import Linear
from einlinear.nn.known import features, is_conv1d, known
from einlinear.structures import Structure


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """All linear layers, structured ones among them, by every qualified name they have."""
    return layers_of(
        model, "el.Linear.from_dense(layer, structure)", lambda m: isinstance(m, nn.Linear | Linear) or is_conv1d(m)
    )


def reason_to_skip(module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced, whatever by."""
    if isinstance(module, Linear):
        return f"is already structured: {module.structure.spec}"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"is a {type(module).__name__}, a subclass of nn.Linear that may be used in other ways"
    return "has hooks, which would be lost" if has_hooks(module) else None


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Which modules hold a parameter, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def uncalled_layers(model: nn.Module) -> dict[int, str]:
    """Why layers, by their id, would save nothing."""
    return {
        id(module.out_proj): "nn.MultiheadAttention reads its weight and never calls it: nothing would be saved"
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Why parameters that are the weights of many experts at once are no linear layers, by their qualified names.

    transformers keeps the experts of most mixtures in such a stack, in a module whose class is called something with
    "Experts". There is no module for one of them that could be replaced.
    """
    return {
        f"{name}.{key}": f"is a stack of {len(weight)} weights of a {type(module).__name__}, which is not supported"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and known(module) is None
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def fresh(old: Any, structure: str | Structure, normalize: bool = False) -> Linear:
    """A structured layer of the size, the device, the dtype and the modes of a dense one, with weights of its own."""
    fan_in, fan_out = features(old)
    layer = Linear(fan_in, fan_out, structure, old.bias is not None, normalize, old.weight.device, old.weight.dtype)
    layer.dense_class = type(old)
    for parameter in layer.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(old.bias.requires_grad)
    return layer.train(old.training)
