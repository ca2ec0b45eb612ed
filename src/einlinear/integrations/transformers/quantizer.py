"""Quantizer of transformers that makes structured layers in `from_pretrained`, and unmarks the model as quantised."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from einlinear.integrations.transformers import METHOD
from einlinear.integrations.transformers.saving import OPTIONAL, REQUIRED, VERSION, forget
from einlinear.nn import Embedding, Linear
from einlinear.nn.dense_layers import features, is_linear
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.structures import FAMILIES
from einlinear.structures.limits import MAX_SIZE, MAX_TEXT, format_number
from einlinear.structures.spec import is_family


class EinlinearConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, checked."""

    def __init__(self, version: Any = None, layers: Any = None, quant_method: str = METHOD, **unknown: Any) -> None:
        if unknown:
            raise ValueError(f"quantization_config: unknown {', '.join(unknown)}; it has quant_method, version, layers")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own ones are an enumeration
        self.version, self.layers = version, _check(version, layers)


class EinlinearQuantizer(HfQuantizer):
    """Replaces the layers that config.json describes, and checks that all their weights were loaded."""

    quantization_config: EinlinearConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: EinlinearConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config is for saved folders. Load the dense model without it, then call el.convert"
            )
        self.names: list[str] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = self.quantization_config.layers
        self.names = _restore(model, layers)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        for name, entry in layers.items():
            # an embedding and a head, of which the file has one
            if (first := entry.get("tied_to")) and name in self.names and first in self.names:
                factors = [factor.name for factor in model.get_submodule(name).structure.factors]
                model.all_tied_weights_keys |= {f"{name}.{factor}": f"{first}.{factor}" for factor in factors}
        # the guards of saving.py, whose names may have the prefix in the file and not in the model
        bodies = {re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in self.names}
        ignored = {rf"(^|\.){body}\.weight$" for body in bodies}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        # transformers marks the parameters that it loaded; those on the meta device are read from disk at every use
        for name in self.names:
            layer = model.get_submodule(name)
            for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    wrong = f"{name}.{key} of shape {tuple(tensor.shape)} did not come from the checkpoint"
                    raise ValueError(f"{name} is described as a structured layer, but {wrong}")
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        forget(model.config)

    def is_serializable(self) -> bool:
        return True


def _check(version: Any, layers: Any) -> dict[str, dict[str, Any]]:
    """Return the layers of a description; ValueError if it is malformed or of a newer version."""
    key = "quantization_config"
    if type(version) is not int or version < 1:
        raise ValueError(f"{key}: version must be a whole number such as {VERSION}, not {version!r}")
    if version > VERSION:
        raise ValueError(f"{key} is of version {version}, but this einlinear reads versions up to {VERSION}: update it")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{key}: layers must map the names of layers to descriptions, not {repr(layers)[:80]}")
    for name, entry in layers.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: expected a mapping with {', '.join(REQUIRED)}, not {repr(entry)[:80]}")
        missing = [key for key in REQUIRED if key not in entry]
        unknown = [key for key in entry if key not in REQUIRED and key not in OPTIONAL]
        if missing or unknown:
            wrong = f"has no {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which is unknown"
            allowed = f"an entry has {', '.join(REQUIRED)}, and may have {' and '.join(OPTIONAL)}"
            raise ValueError(f"{name} {wrong}: {allowed}")
        for field, value in entry.items():
            expected = REQUIRED.get(field) or type(OPTIONAL[field])
            if type(value) is not expected:
                raise ValueError(f"{name}: {field} must be of type {expected.__name__}, not {repr(value)[:80]}")
            if expected is int and not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name}: {field} must be from 1 to {MAX_SIZE}, not {format_number(value)}")
            if expected is str and len(value) > MAX_TEXT:
                raise ValueError(f"{name}: {field} must have at most {MAX_TEXT:,} characters")
    return {name: dict(entry) for name, entry in layers.items()}


def _restore(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Replace the dense layers of a model by those of a description, without weights, and return their names."""
    # a model of another class has another head, or is a submodel, whose config names no class: it may lack layers
    is_partial = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    # transformers removes the prefixes of some submodels
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    places: list[str] = []
    # by dense layer: a module with two names stays one module
    new: dict[nn.Module, Linear | Embedding] = {}
    for name, entry in layers.items():
        renamed = f"{name}.weight"
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        # models with a head have the prefix ("bert" in "bert.encoder.layer.0"), bodies lack it; either is described
        aliases = (name, renamed.removesuffix(".weight"), f"{prefix}{name}", name.removeprefix(prefix))
        place = next((alias for alias in aliases if alias in modules), None)
        if place is None:
            if is_partial:
                continue
            raise ValueError(f"{name} is described as a structured layer, but {type(model).__name__} has none there")
        old = modules[place]
        is_table = entry.get("embedding", False)
        if not (isinstance(old, nn.Embedding) if is_table else is_linear(old)):
            expected = "no embedding" if is_table else "not linear"
            raise ValueError(f"{place} is described as a structured layer, but is a {type(old).__name__}, {expected}")
        size = entry["in_features"], entry["out_features"]
        if features(old) != size:
            described, actual = ("{} -> {}".format(*sizes) for sizes in (size, features(old)))
            raise ValueError(f"{place} is described as {described} features, but the model has {actual} there")
        if old not in new:
            try:
                new[old] = _new_layer(old, entry)
            except (ValueError, TypeError) as error:
                spec, hint = entry["structure"], ""
                if is_family(spec) and spec.partition("(")[0].strip() not in FAMILIES:
                    hint = ". Register a family of your own with el.register_family before you load the model"
                raise ValueError(f"{place}: {error}{hint}") from None
            new[old].dense_class = type(old)
        parent, _, child = place.rpartition(".")
        setattr(modules[parent], child, new[old])
        places.append(place)
    return places


def _new_layer(old: Any, entry: Mapping[str, Any]) -> Linear | Embedding:
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    if entry.get("embedding"):
        return Embedding(entry["out_features"], entry["in_features"], entry["structure"], old.padding_idx, **like)
    arguments = {key: value for key, value in entry.items() if key not in ("embedding", "tied_to")}
    return (QuantizedLinear if entry.get("precision") else Linear)(**arguments, **like)
