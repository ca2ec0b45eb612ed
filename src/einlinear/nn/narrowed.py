"""Narrowed blocks: plain dense layers with fewer features than the config of their model says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from einlinear.nn.dense_layers import as_class

# of the module around the layers of a block: what `save_pretrained` has to describe
_MARK = "einlinear_narrowed"


def resized(old: Any, in_features: int, out_features: int) -> Any:
    """Return an uninitialised layer of a dense layer's class, dtype, device and mode, with other features."""
    kind: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    # torch warns of the initialisation of a weight without entries
    layer = nn.Linear(1, 1, old.bias is not None, device="meta")
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, **kind), old.weight.requires_grad)
    if old.bias is not None:
        layer.bias = nn.Parameter(torch.empty(out_features, **kind), old.bias.requires_grad)
    return as_class(layer, type(old)).train(old.training)


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Set attributes of modules, by qualified name."""
    for name, values in attributes.items():
        vars(model.get_submodule(name)).update(values)


def mark_narrowed(owner: nn.Module, layers: list[str], attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Note the narrowed layers inside a module, and the attributes that were changed, by names relative to it."""
    before = vars(owner).get(_MARK, {"layers": [], "attributes": {}})
    names = [*dict.fromkeys([*before["layers"], *layers])]
    setattr(owner, _MARK, {"layers": names, "attributes": {**before["attributes"], **attributes}})


def narrowed_layers(model: nn.Module) -> tuple[set[str], dict[str, dict[str, int]]]:
    """Return the names of narrowed layers, and the attributes that were changed with them, by module."""
    layers, attributes = set[str](), dict[str, dict[str, int]]()
    for name, module in model.named_modules(remove_duplicate=False):
        if mark := vars(module).get(_MARK):
            layers |= {joined(name, layer) for layer in mark["layers"]}
            for place, values in mark["attributes"].items():
                attributes.setdefault(joined(name, place), {}).update(values)
    return layers, attributes


def joined(name: str, child: str) -> str:
    """Return the qualified name of a module inside another one; either may be "", the module itself."""
    return f"{name}.{child}" if name and child else name or child


@torch.no_grad()
def copy_into(layer: Any, weight: torch.Tensor) -> None:
    """Set the weight of a dense layer, (out_features, in_features)."""
    layer.weight.copy_(weight if isinstance(layer, nn.Linear) else weight.T)
