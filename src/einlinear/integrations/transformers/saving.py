"""`save_pretrained` of models with structured layers: config.json describes them by name, as arguments of `Linear`.

The stacks of `GatedExperts` are layers with a number of experts: "mlp.experts.gate", "mlp.experts.up" and so on.
"""

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from einlinear.adapters import AdaptedLinear
from einlinear.integrations.transformers import METHOD
from einlinear.nn import Embedding, Experts, GatedExperts, Linear
from einlinear.nn.dense_layers import features, is_linear
from einlinear.nn.layer_descriptions import SelfDescribing
from einlinear.nn.narrowed import narrowed_layers

VERSION = 1
# the keys of an entry with their types, and optional keys with their defaults
REQUIRED: dict[str, Any] = {"structure": str, "in_features": int, "out_features": int, "bias": bool}
OPTIONAL: dict[str, Any] = {"normalize": False, "gamma": True, "precision": "", "narrowed": False}
OPTIONAL |= {"embedding": False, "tied_to": "", "experts": 0}

# a Python file in the folder: transformers loads the config before the model, whatever the model's class
_FILE = "configuration_einlinear"
_CODE = '''"""With this, from_pretrained(..., trust_remote_code=True) loads the folder where einlinear is installed."""

import einlinear  # noqa: F401
import transformers


class {name}(transformers.{name}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return transformers.{name}.from_pretrained(*args, **kwargs)
'''


def extend_save_pretrained() -> None:
    """Let `PreTrainedModel.save_pretrained` describe structured layers; models without any are saved as before."""
    # imports the quantizers, which import this module
    from transformers.modeling_utils import PreTrainedModel

    original: Any = PreTrainedModel.save_pretrained
    if original.__module__ == __name__:
        return

    @wraps(original, assigned=("__doc__", "__name__", "__qualname__"))
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        forget(self.config)
        # with adapters of peft, transformers saves only these
        layers = {} if getattr(self, "_hf_peft_config_loaded", False) else _describe(self)
        if not layers:
            return original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        _check(self, layers)
        # an empty tensor in the place of each dense weight makes transformers raise where this library is not imported
        guards = dict(guard(self, name) for name in layers if not is_linear(self.get_submodule(name)))
        state_dict = {**(self.state_dict() if state_dict is None else state_dict), **guards}
        for name in (name for name, entry in layers.items() if entry.get("tied_to")):
            for parameter, _ in self.get_submodule(name).named_parameters():
                if parameter != "bias":
                    del state_dict[f"{name}.{parameter}"]
        description = {"quant_method": METHOD, "version": VERSION, "layers": layers}
        if attributes := narrowed_layers(self)[1]:
            description["attributes"] = attributes
        self.config.quantization_config = description
        try:
            _add_code(self.config, Path(save_directory), is_main_process)
            return original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            forget(self.config)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def forget(config: Any) -> None:
    """Remove the description from a model's config, which holds only for a folder. Entries of others stay."""
    described = getattr(config, "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    if method == METHOD:
        del config.quantization_config
    if classes := getattr(config, "auto_map", None):
        config.auto_map = {name: value for name, value in classes.items() if f"{_FILE}." not in str(value)}
        if not config.auto_map:
            del config.auto_map


def guard(model: nn.Module, name: str) -> tuple[str, torch.Tensor]:
    """Return the name of a layer's dense weight in a file, and the empty tensor that stands there."""
    if isinstance(model.get_submodule(name), Experts):
        # transformers may split it, by expert and into gate and up
        return f"{name.rpartition('.')[0]}.gate_up_proj", torch.empty(1, 2, 0)
    return f"{name}.weight", torch.empty(0)


def _describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    layers, first = dict[str, dict[str, Any]](), dict[tuple[int, ...], str]()
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    narrow, _ = narrowed_layers(model)
    for name, module in modules.items():
        if name in narrow and is_linear(module):
            sizes = dict(zip(("in_features", "out_features"), features(module), strict=True))
            layers[name] = {"structure": "dense", **sizes, "bias": module.bias is not None, "narrowed": True}
            continue
        if isinstance(module, Linear) and type(module).forward is Linear.forward:
            s, gamma = module.structure, module.has_gamma or not module.normalize
            entry = {"structure": s.spec, "in_features": s.in_features, "out_features": s.out_features}
            flags: dict[str, Any] = {"bias": module.bias is not None, "normalize": module.normalize, "gamma": gamma}
            flags |= {"precision": getattr(module, "precision", ""), "narrowed": name in narrow}
            layers[name] = entry | {key: value for key, value in flags.items() if value != OPTIONAL.get(key)}
        elif isinstance(module, Embedding):
            s = module.structure
            entry = {"structure": s.spec, "in_features": s.in_features, "out_features": s.out_features, "bias": False}
            layers[name] = entry | {"embedding": True}
        elif isinstance(module, GatedExperts) and module.dense is not None:
            layers |= {f"{name}.{key}": _describe_stack(stack) for key, stack in module.stacks().items()}
        elif isinstance(module, AdaptedLinear):
            wrong = f"{name} has adapters, and from_pretrained could not load the folder: save them with"
            raise ValueError(f"{wrong} el.adapters.save(model, path), or call el.adapters.merge and remove first")
        # the stacks of experts are in
        elif isinstance(module, SelfDescribing) and name not in layers:
            wrong = f"{name} is a {type(module).__name__}: only el.Linear, el.Embedding and experts can be saved"
            raise ValueError(f"{wrong} with a Hugging Face model. Save its state_dict() instead")
        # an embedding and a head may share their factors
        weight = tuple(map(id, module.weight_parameters())) if name in layers else ()
        if weight and modules[first.setdefault(weight, name)] is not module:
            layers[name]["tied_to"] = first[weight]
    return layers


def _describe_stack(stack: Experts) -> dict[str, Any]:
    s, gamma = stack.structure, stack.has_gamma or not stack.normalize
    entry = {"structure": s.spec, "in_features": s.in_features, "out_features": s.out_features, "bias": False}
    flags = {"experts": stack.experts, "normalize": stack.normalize, "gamma": gamma}
    return entry | {key: value for key, value in flags.items() if value != OPTIONAL[key]}


def _check(model: Any, layers: Mapping[str, Any]) -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"structured layers are saved with transformers 5 or later, not {transformers.__version__}")
    if getattr(model.config, "quantization_config", None) is not None:
        name = next(iter(layers))
        raise ValueError(f"{name} is a structured layer in a model that is quantised: call el.densify(model) first")
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    tied = {other: name for name, other in ties.items()} | ties
    for name in layers:
        if other := tied.get(f"{name}.weight"):
            wrong = f"{name} is a structured layer, but config.tie_word_embeddings would tie its weight to {other}"
            raise ValueError(f"{wrong} when it is loaded: set model.config.tie_word_embeddings = False")


def _add_code(config: Any, folder: Path, is_main_process: bool) -> None:
    """Write a Python file that imports this library, for processes that do not, such as lm_eval."""
    name = type(config).__name__
    # not where the config has code of its own
    if getattr(transformers, name, None) is type(config):
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), "AutoConfig": f"{_FILE}.{name}"}
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{_FILE}.py").write_text(_CODE.format(name=name), encoding="utf-8")
