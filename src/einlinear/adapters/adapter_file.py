"""Adapters on disk: a safetensors file of the factors, and of every layer structure, scale and dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.adapters.adaptation import adaptable_layers, attach, check_name, check_numbers, reason_not_to_adapt
from einlinear.adapters.adaptation_report import AdaptationReport
from einlinear.adapters.adapted_linear import AdaptedLinear, Adapter
from einlinear.adapters.merging import adapted_layers
from einlinear.nn.dense_layers import features
from einlinear.nn.sharded_tensors import full_tensor
from einlinear.structures import structure as make_structure

_KIND = "einlinear adapter"
_ENTRY: dict[str, Any] = {"structure": str, "in_features": int, "out_features": int, "scale": float, "dropout": float}


def save(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Write one adapter of a model to a safetensors file, atomically: its factors, and no weight of the model.

    Args:
        model: a model with adapters, also merged ones, or sharded by FSDP2: then every process must call this, and the
            first one writes.
        path: of the file.
        name: of the adapter. None: the only one.

    Raises:
        ValueError: a model without adapters or with several, a name that none has, factors on the meta device.
        OSError: the file cannot be written; an earlier one is unchanged.

    Example:
        >>> import torch, einlinear as el
        >>> model, folder = torch.nn.Sequential(torch.nn.Linear(64, 64)), getfixture("tmp_path")
        >>> report = el.adapt(model, "monarch(blocks=4)")
        >>> el.adapters.save(model, folder / "a.safetensors")
        >>> el.adapters.load(torch.nn.Sequential(torch.nn.Linear(64, 64)), folder / "a.safetensors").trainable
        2048
    """
    # takes long to import
    from einlinear.checkpoint import write_tensors

    layers = adapted_layers(model)
    names = dict.fromkeys(key for layer in layers.values() for key in layer.adapters)
    if name is None and len(names) > 1:
        raise ValueError(f"the model has several adapters: name one of {', '.join(names)}")
    name = next(iter(names)) if name is None else name
    if name not in names:
        raise ValueError(f"the model has no adapter named {name!r}, but {', '.join(names)}")
    entries, tensors = dict[str, Any](), dict[str, Tensor]()
    for key, layer in layers.items():
        if name not in layer.adapters:
            continue
        adapter: Any = layer.adapters[name]
        entries[key] = _entry(adapter)
        for factor, parameter in adapter.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"the adapter of {key} is on the meta device and has no values to save")
            tensors[f"{key}.{factor}"] = full_tensor(parameter)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    try:
        write_tensors(Path(path), tensors, {"kind": _KIND, "adapter": name, "layers": entries})
    # it says neither what nor where if the disk is full
    except OSError as error:
        raise OSError(f"the adapter {path} cannot be written: {error}") from error


def load(model: nn.Module, path: str | Path, name: str | None = None) -> AdaptationReport:
    """Read an adapter from a file of `save` and make it the active one; no code of the file is executed.

    The model may have no adapters yet: the file says which layers get one, of which structure. An adapter of the same
    name, layers and structures is replaced.

    Args:
        model: a model whose layers have the names and sizes of the one that was saved.
        path: of the file.
        name: of the adapter in this model. None: as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, or no adapter, or of another model. The model is then unchanged.
    """
    from einlinear.checkpoint import read_tensors

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter {path}")
    try:
        tensors, metadata = read_tensors(path)
        saved_name, entries = _check_metadata(metadata)
        name = saved_name if name is None else name
        check_name(name)
        layers = adaptable_layers(model)
        adapters = {key: _adapter(key, entry, tensors, layers.get(key), layers) for key, entry in entries.items()}
        if tensors:
            raise ValueError(f"it has tensors that belong to no layer: {', '.join([*tensors][:3])}")
        _check_same(name, adapters, layers)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter {path} cannot be loaded: {error}") from None
    return attach(model, name, adapters)


def _entry(adapter: Adapter) -> dict[str, Any]:
    s = adapter.structure
    entry = {"structure": s.spec, "in_features": s.in_features, "out_features": s.out_features}
    return entry | {"scale": float(adapter.scale), "dropout": float(adapter.dropout)}


def _check_metadata(metadata: Any) -> tuple[str, dict[str, Any]]:
    """Return the adapter's name and its layers; ValueError if the file holds something else."""
    if not isinstance(metadata, dict) or metadata.get("kind") != _KIND:
        raise ValueError("it is no file of el.adapters.save")
    name, entries = metadata.get("adapter"), metadata.get("layers")
    if not isinstance(name, str) or not isinstance(entries, dict) or not entries:
        raise ValueError("its metadata name no adapter or no layers")
    for key, entry in entries.items():
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != _ENTRY:
            raise ValueError(f"its metadata of {key} are {entry!r}, and not {', '.join(_ENTRY)}")
        check_numbers(entry["scale"], entry["dropout"])
    return name, entries


def _adapter(key: str, entry: Any, tensors: dict[str, Tensor], layer: Any, layers: dict[str, Any]) -> Adapter:
    """Return the adapter of a layer, whose tensors are taken out of the file's."""
    if layer is None:
        raise ValueError(f"the model has no linear layer {key}, but {', '.join([*layers][:5]) or 'none'}")
    size = entry["in_features"], entry["out_features"]
    if size != features(layer):
        raise ValueError("{} has {} -> {} features, but {} -> {} in the file".format(key, *features(layer), *size))
    if layer.weight.is_meta:
        raise ValueError(f"{key} is on the meta device: load the model first")
    reason = reason_not_to_adapt(layer, "")
    if reason is not None:
        raise ValueError(f"{key} {reason}")
    try:
        structure = make_structure(entry["structure"], *size)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    values = dict[str, Tensor]()
    for factor in structure.factors:
        if f"{key}.{factor.name}" not in tensors:
            raise ValueError(f"it has no tensor {key}.{factor.name}")
        values[factor.name] = value = tensors.pop(f"{key}.{factor.name}")
        if tuple(value.shape) != factor.shape or not value.is_floating_point():
            found = f"shape {tuple(value.shape)} and dtype {value.dtype}"
            raise ValueError(f"{key}.{factor.name} has {found}, but {structure.spec} has floats of {factor.shape}")
    # nothing is drawn
    adapter = Adapter(*size, structure, entry["scale"], entry["dropout"], device="meta")
    adapter.load_state_dict({name: value.to(layer.weight.device) for name, value in values.items()}, assign=True)
    return adapter


def _check_same(name: str, adapters: dict[str, Adapter], layers: dict[str, Any]) -> None:
    """Raise ValueError if the model has an adapter of this name, on other layers or of other structures."""
    adapted = {key: layer for key, layer in layers.items() if isinstance(layer, AdaptedLinear)}
    named: dict[str, Any] = {key: layer.adapters[name] for key, layer in adapted.items() if name in layer.adapters}
    before = {key: adapter.structure.spec for key, adapter in named.items()}
    now = {key: adapter.structure.spec for key, adapter in adapters.items()}
    if not before:
        return
    # a module that has several names has one adapter
    same = {id(layers[key]): spec for key, spec in before.items()} == {id(layers[key]): s for key, s in now.items()}
    if not same:
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        wrong = f"{key} has {before.get(key, 'none')} in the model, {now.get(key, 'none')} in the file"
        raise ValueError(
            f"the model has another adapter named {name!r}: {wrong}. Give another name, or remove that one"
        )
