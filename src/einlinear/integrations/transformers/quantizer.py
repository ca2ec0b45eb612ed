"""Quantizer of transformers that makes structured layers in `from_pretrained`, and unmarks the model as quantised."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from einlinear.conversion.experts import reason_to_skip_experts
from einlinear.integrations.transformers import METHOD
from einlinear.integrations.transformers.saving import OPTIONAL, REQUIRED, VERSION, forget, guard
from einlinear.nn import Embedding, GatedExperts, Linear
from einlinear.nn.dense_layers import features, is_linear
from einlinear.nn.narrowed import mark_narrowed, resized, set_attributes
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.structures import FAMILIES
from einlinear.structures.limits import MAX_SIZE, MAX_TEXT, format_number
from einlinear.structures.spec import is_family


class EinlinearConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, checked."""

    def __init__(
        self,
        version: Any = None,
        layers: Any = None,
        attributes: Any = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = "quant_method, version, layers, and may have attributes"
            raise ValueError(f"quantization_config: unknown {', '.join(unknown)}; it has {known}")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own ones are an enumeration
        self.version, self.layers = version, _check(version, layers)
        self.attributes = _check_attributes(attributes or {})


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
        if find_spec("transformers.distributed.mixin"):
            from einlinear.integrations.transformers.parallel_styles import remember_names

            remember_names(model)
        _restore_attributes(model, self.quantization_config.attributes)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        for name, entry in layers.items():
            # an embedding and a head, of which the file has one
            if (first := entry.get("tied_to")) and name in self.names and first in self.names:
                factors = [factor.name for factor in model.get_submodule(name).structure.factors]
                model.all_tied_weights_keys |= {f"{name}.{factor}": f"{first}.{factor}" for factor in factors}
        # the guards of saving.py, whose names may have the prefix in the file and not in the model
        guarded = {guard(model, name)[0].removeprefix(f"{model.base_model_prefix}.") for name in self.names}
        ignored = {rf"(^|\.){re.escape(name)}$" for name in guarded}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        if model.tp_size and not find_spec("transformers.distributed.mixin"):
            have = f"not {transformers.__version__}"
            raise ImportError(f"tensor parallelism of structured layers needs transformers 5.16 or later, {have}")
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
            # a block may be narrowed to nothing
            least = 0 if entry.get("narrowed") is True else 1
            if expected is int and not least <= value <= MAX_SIZE:
                raise ValueError(f"{name}: {field} must be from {least} to {MAX_SIZE}, not {format_number(value)}")
            if expected is str and len(value) > MAX_TEXT:
                raise ValueError(f"{name}: {field} must have at most {MAX_TEXT:,} characters")
    return {name: dict(entry) for name, entry in layers.items()}


def _check_attributes(attributes: Any) -> dict[str, dict[str, int]]:
    """Return the attributes of modules; ValueError if they are not numbers by name."""
    if not isinstance(attributes, Mapping) or not all(isinstance(values, Mapping) for values in attributes.values()):
        wrong = repr(attributes)[:80]
        raise ValueError(f"quantization_config: attributes must map modules to numbers by name, not {wrong}")
    for name, values in attributes.items():
        for key, value in values.items():
            if type(value) is not int or not 0 <= value <= MAX_SIZE:
                wrong = repr(value)[:80]
                raise ValueError(f"{name}.{key} must be a whole number from 0 to {MAX_SIZE}, not {wrong}")
    return {name: dict(values) for name, values in attributes.items()}


def _restore(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Replace the dense layers of a model by those of a description, without weights, and return their names."""
    # a model of another class has another head, or is a submodel, whose config names no class: it may lack layers
    is_partial = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    places: list[str] = []
    # by dense layer: a module with two names stays one module
    new: dict[nn.Module, nn.Module] = {}
    for name, entries in _by_module(layers).items():
        place = _place_of(name, model, modules)
        if place is None:
            if is_partial:
                continue
            raise ValueError(f"{name} is described as a structured layer, but {type(model).__name__} has none there")
        old, entry = modules[place], entries.get("")
        if entry is not None:
            _check_place(place, old, entry)
        if old not in new:
            with _naming(place, [entry["structure"] for entry in entries.values()]):
                new[old] = _new_experts(old, entries) if entry is None else _new_layer(old, entry)
        parent, _, child = place.rpartition(".")
        setattr(modules[parent], child, new[old])
        places += [".".join(filter(None, (place, stack))) for stack in entries]
        if entry is not None and entry.get("narrowed"):
            mark_narrowed(model, [place], {})
    return places


def _by_module(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the entries of every module that is replaced: one named "", or those of the stacks of experts."""
    modules: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in layers.items():
        module, stack = name.rpartition(".")[::2] if entry.get("experts") else (name, "")
        modules.setdefault(module, {})[stack] = entry
    return modules


def _check_place(place: str, old: Any, entry: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry is not of the kind or the size of the layer at its place."""
    is_embedding = entry.get("embedding", False)
    if not (isinstance(old, nn.Embedding) if is_embedding else is_linear(old)):
        expected = "no embedding" if is_embedding else "not linear"
        raise ValueError(f"{place} is described as a structured layer, but is a {type(old).__name__}, {expected}")
    size = entry["in_features"], entry["out_features"]
    if features(old) != size and not entry.get("narrowed"):
        described, actual = ("{} -> {}".format(*sizes) for sizes in (size, features(old)))
        raise ValueError(f"{place} is described as {described} features, but the model has {actual} there")


@contextmanager
def _naming(place: str, specs: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        hint = ""
        if any(is_family(spec) and spec.partition("(")[0].strip() not in FAMILIES for spec in specs):
            hint = ". Register a family of your own with el.register_family before you load the model"
        raise ValueError(f"{place}: {error}{hint}") from None


def _new_experts(old: Any, entries: Mapping[str, Mapping[str, Any]]) -> GatedExperts:
    """Return structured experts of the entries of their stacks, without weights, in the place of dense ones."""
    if reason := reason_to_skip_experts(old):
        raise ValueError(f"is described as structured experts, but the model's {reason}")
    first = next(iter(entries.values()))
    config = {key: first.get(key, OPTIONAL[key]) for key in ("normalize", "gamma")}
    structures = {name: entry["structure"] for name, entry in entries.items()}
    layer: GatedExperts = GatedExperts.like(old, structures, **config)
    for name, stack in layer.stacks().items():
        entry, size = entries[name], (stack.in_features, stack.out_features)
        described = entry["in_features"], entry["out_features"], entry["experts"]
        if described != (*size, stack.experts):
            actual = f"{stack.experts} experts of {size[0]} -> {size[1]}"
            wrong = f"{described[2]} experts of {described[0]} -> {described[1]}"
            raise ValueError(f"{name} is described as {wrong} features, but the model has {actual} there")
    return layer


def _new_layer(old: Any, entry: Mapping[str, Any]) -> nn.Module:
    """Return a layer of an entry, without weights, in the place of a dense one."""
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    if entry.get("embedding"):
        return Embedding(entry["out_features"], entry["in_features"], entry["structure"], old.padding_idx, **like)
    if entry.get("narrowed") and entry["structure"] == "dense" and not entry.get("precision"):
        return resized(old, entry["in_features"], entry["out_features"])  # type: ignore[no-any-return]
    arguments = {key: value for key, value in entry.items() if key not in ("embedding", "narrowed", "tied_to")}
    layer = (QuantizedLinear if entry.get("precision") else Linear)(**arguments, **like)
    layer.dense_class = type(old)
    return layer


def _place_of(name: str, model: Any, modules: Mapping[str, Any]) -> str | None:
    """Return the name in a model of a module of a description, or None."""
    # transformers removes the prefixes of some submodels
    renamed = f"{name}.weight"
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightRenaming):
            renamed, _ = entry.rename_source_key(renamed)
    prefix = f"{model.base_model_prefix}."
    # models with a head have the prefix ("bert" in "bert.encoder.layer.0"), bodies lack it; either is described
    aliases = (name, renamed.removesuffix(".weight"), f"{prefix}{name}", name.removeprefix(prefix))
    return next((alias for alias in aliases if alias in modules), None)


def _restore_attributes(model: Any, attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Set the attributes of modules that have them; a submodel lacks some modules."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name, values in attributes.items():
        place = _place_of(name, model, modules)
        if place is not None:
            if unknown := [key for key in values if type(vars(modules[place]).get(key)) is not int]:
                raise ValueError(f"{place} has no number called {', '.join(unknown)}, which the description changes")
            set_attributes(model, {place: values})
            mark_narrowed(model, [], {place: values})
