"""Linear layers of a model by name, and their replacement in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any

from torch import nn

from einlinear.nn import Conv1d, Conv2d, Embedding, Linear, MoELinear, QuantizedLinear
from einlinear.nn.dense_layers import is_linear
from einlinear.nn.names import plain_modules
from einlinear.structures import Structure

# other dense layers become `Linear`
_BY_DENSE_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
}
# all that replace a dense layer; adapters replace none
STRUCTURED_CLASSES: tuple[type[nn.Module], ...] = (Linear, *_BY_DENSE_CLASS.values())


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers, structured ones included, by every name they have, without prefixes of wrappers."""
    return layers_of(model, "el.Linear.from_dense(layer, structure)", is_any_linear)


def is_any_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, structured or dense."""
    return isinstance(module, Linear | MoELinear) or is_linear(module)


def modules_of(model: nn.Module, kinds: type | UnionType) -> dict[str, Any]:
    """Return the modules of these classes inside a model, by every qualified name they have."""
    return {name: module for name, module in plain_modules(model) if name and isinstance(module, kinds)}


def layers_of(model: nn.Module, instead: str, is_one: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Return the layers of a kind by every qualified name they have; `instead` is the advice for a bare layer."""
    if is_one(model):
        raise ValueError(f"the model is itself a linear layer, which cannot be replaced in place: use {instead}")
    return {name: module for name, module in plain_modules(model) if is_one(module)}


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the modules that hold a parameter, with their names, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in plain_modules(model, remove_duplicate=True):
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def structured_class(dense: Any) -> Any:
    """Return the class of layers that replace a dense one."""
    return next((new for kind, new in _BY_DENSE_CLASS.items() if isinstance(dense, kind)), Linear)


def structured_like(old: Any, structure: str | Structure, **config: Any) -> Any:
    """Return a new structured layer like an old one; "precision" makes it quantised, "experts" a `MoELinear`."""
    kind: Any = (
        MoELinear if "experts" in config else QuantizedLinear if "precision" in config else structured_class(old)
    )
    return kind.like(old, structure, **config)


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new modules into all places of the old ones, by the id of the old."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])


def set_config_ties(model: Any, is_tied: bool) -> None:
    """Tell the config of a transformers model whether table and output head have one dense weight, if it says so."""
    if hasattr(config := getattr(model, "config", None), "tie_word_embeddings"):
        config.tie_word_embeddings = is_tied  # type: ignore[union-attr]
