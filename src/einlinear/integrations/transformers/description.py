"""Description of a model's structured layers in config.json, and how they replace dense layers when it is loaded.

A description maps qualified names to arguments of `Linear`. It is plain JSON, and this module does not need
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from einlinear.nn import Linear
from einlinear.nn.layer_info import SelfDescribing
from einlinear.nn.third_party import features, is_linear
from einlinear.structures import FAMILIES
from einlinear.structures.limits import MAX_SIZE, MAX_TEXT, format_number
from einlinear.structures.spec import is_family

METHOD = "einlinear"
VERSION = 1
MAX_LAYERS = 1_000_000
# the Python file of saving.py that config.json names
CODE = "configuration_einlinear"
# the keys of an entry with their types, and optional keys with their defaults
_REQUIRED: dict[str, type] = {"structure": str, "in_features": int, "out_features": int, "bias": bool}
_OPTIONAL = {"normalize": False, "gamma": True}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the structured layers of a model, by every qualified name they have, as JSON values.

    Raises:
        ValueError: a layer of this library that is no `Linear`, such as `MoELinear`: it has no description yet.
    """
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and type(module).forward is Linear.forward:
            entry = {
                "structure": module.structure.spec,
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": module.bias is not None,
                "normalize": module.normalize,
                "gamma": module.has_gamma or not module.normalize,
            }
            layers[name] = {k: value for k, value in entry.items() if k not in _OPTIONAL or value != _OPTIONAL[k]}
        elif isinstance(module, SelfDescribing):
            raise ValueError(
                f"{name} is a {type(module).__name__}: of this library's layers only el.Linear can be saved with a "
                "Hugging Face model. Save its state_dict() instead"
            )
    return layers


def check(version: Any, layers: Any) -> dict[str, dict[str, Any]]:
    """Check a description that was read from a file, and return its layers.

    Raises:
        ValueError: it comes from a newer version, or is malformed.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"quantization_config: version must be a whole number such as {VERSION}, not {version!r}")
    if version > VERSION:
        raise ValueError(
            f"quantization_config is of version {version}, but this einlinear reads versions up to {VERSION}: update it"
        )
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"quantization_config: layers must map the names of layers to descriptions, not {repr(layers)[:80]}"
        )
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"quantization_config describes {len(layers):,} layers, more than {MAX_LAYERS:,}")
    for name, entry in layers.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: expected a mapping with {', '.join(_REQUIRED)}, not {repr(entry)[:80]}")
        missing = [key for key in _REQUIRED if key not in entry]
        unknown = [key for key in entry if key not in _REQUIRED and key not in _OPTIONAL]
        if missing or unknown:
            wrong = f"has no {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which is unknown"
            raise ValueError(
                f"{name} {wrong}: an entry has {', '.join(_REQUIRED)}, and may have {' and '.join(_OPTIONAL)}"
            )
        for key, value in entry.items():
            expected = _REQUIRED.get(key, bool)
            if type(value) is not expected:
                raise ValueError(f"{name}: {key} must be of type {expected.__name__}, not {repr(value)[:80]}")
        for key in ("in_features", "out_features"):
            if not 1 <= entry[key] <= MAX_SIZE:
                raise ValueError(f"{name}: {key} must be from 1 to {MAX_SIZE}, not {format_number(entry[key])}")
        if len(entry["structure"]) > MAX_TEXT:
            raise ValueError(f"{name}: structure must have at most {MAX_TEXT:,} characters")
    return {name: dict(entry) for name, entry in layers.items()}


def restore(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Any]],
    prefix: str = "",
    partial: bool = False,
    rename: Callable[[str], str] = lambda name: name,
) -> dict[str, str]:
    """Replace the dense layers of a model by those of a description, without weights, in place.

    Args:
        model: a model as its class makes it.
        layers: from `check`.
        prefix: of names in a model with a head, which names in its body lack ("bert" in "bert.encoder.layer.0"); either
            may be the one in the description.
        partial: whether the model may lack some of the layers, as a body lacks those of a head.
        rename: maps a name of the whole model to one of this submodel.

    Returns:
        The names of the layers in this model, by those in the description.

    Raises:
        ValueError: the model has no layer of a name, or one that is not linear or of other features; a structure that
            is unknown or does not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    # by id of the dense layer: a module with two names stays one module
    new: dict[int, Linear] = {}
    for name, entry in layers.items():
        aliases = (name, rename(name), f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        place = next((alias for alias in aliases if alias in modules), None)
        if place is None:
            if partial:
                continue
            raise ValueError(f"{name} is described as a structured layer, but {type(model).__name__} has none there")
        old: Any = modules[place]
        if not is_linear(old):
            raise ValueError(f"{place} is described as a structured layer, but is a {type(old).__name__}, not linear")
        if features(old) != (entry["in_features"], entry["out_features"]):
            raise ValueError(
                f"{place} is described as {entry['in_features']} -> {entry['out_features']} features, but the model "
                f"has {' -> '.join(map(str, features(old)))} there"
            )
        if id(old) not in new:
            new[id(old)] = _build(place, entry, old.weight.device, old.weight.dtype)
            new[id(old)].dense_class = type(old)
        parent, _, child = place.rpartition(".")
        setattr(modules[parent], child, new[id(old)])
        names[name] = place
    return names


def _build(name: str, entry: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Linear:
    try:
        return Linear(**entry, device=device, dtype=dtype)
    except (ValueError, TypeError) as error:
        spec = entry["structure"]
        is_custom = is_family(spec) and spec.partition("(")[0].strip() not in FAMILIES
        hint = ". Register a family of your own with el.register_family before you load the model" if is_custom else ""
        raise ValueError(f"{name}: {error}{hint}") from None


def forget(config: Any) -> None:
    """Remove the description from a model's config, which holds only for a folder. Entries of others stay."""
    described = getattr(config, "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    if method == METHOD:
        del config.quantization_config
    classes = {k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if f"{CODE}." not in str(v)}
    if hasattr(config, "auto_map") and classes != config.auto_map:
        config.auto_map = classes
        if not classes:
            del config.auto_map
