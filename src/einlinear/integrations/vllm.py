"""Plugin of vLLM, which serves folders with structured layers that `save_pretrained` wrote.

vLLM calls `register` through the entry point "vllm.general_plugins". It merges some layers, such as queries, keys and
values: each part of such a layer keeps its own weight, structured or dense, and their outputs are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from einlinear.integrations.transformers import METHOD
from einlinear.integrations.transformers.quantizer import EinlinearConfig
from einlinear.nn import Linear
from einlinear.nn.quantized_linear import QuantizedLinear

# vLLM's names of the parts of merged queries, keys and values; those of other layers have numbers
_PARTS = {"q": 0, "k": 1, "v": 2}

# keys of descriptions
_UNSUPPORTED = {
    "embedding": "is a structured embedding, which vLLM cannot load: make it dense, el.densify(model), and save again",
    "tied_to": "shares its factors with an embedding, which vLLM cannot load: call el.densify(model), and save again",
    "narrowed": "has fewer features than the config says: compress with 'narrow(uniform=True)' instead",
}


def register() -> None:
    """Let vLLM load folders whose config.json describes structured layers."""
    register_quantization_config(METHOD)(StructuredLayersConfig)


class StructuredLayersConfig(QuantizationConfig):
    """The description in config.json: structured layers by name. All others are dense."""

    def __init__(self, layers: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StructuredLayersConfig:
        """Read a description. ValueError if it is malformed, or of layers that vLLM has no place for."""
        layers = EinlinearConfig(**config).layers
        for name, entry in layers.items():
            for key, advice in _UNSUPPORTED.items():
                if entry.get(key):
                    raise ValueError(f"{name} {advice}")
        return cls(layers)

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        # of a GPU: any
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        # all is in config.json
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how a layer is computed; None for a layer that is not linear."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, child = prefix.rpartition(".")
        merged = [".".join(filter(None, (parent, name))) for name in self.packed_modules_mapping.get(child, ())]
        names = merged if not self.layers.keys().isdisjoint(merged) else [prefix]
        if self.layers.keys().isdisjoint(names):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return StructuredLinearMethod({name: self.layers.get(name) for name in names})


class StructuredLinearMethod(LinearMethodBase):
    """A linear layer of vLLM in parts, by name: structured ones with their description, and dense ones with None."""

    def __init__(self, descriptions: Mapping[str, Mapping[str, Any] | None]) -> None:
        self.descriptions = descriptions

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Add the parts to a layer, and an empty parameter for each name in the folder, which loads into the parts."""
        if getattr(layer, "tp_size", 1) > 1:
            names = ", ".join(self.descriptions)
            raise ValueError(f"{names} cannot be split over devices by vLLM: start it with tensor_parallel_size=1")
        # a single description stands for the whole layer, and a head may have more rows than there are tokens
        sizes = output_partition_sizes if len(self.descriptions) > 1 else [sum(output_partition_sizes)]
        parts = [
            _part(name, entry, input_size, size, isinstance(layer, ParallelLMHead), params_dtype)
            for (name, entry), size in zip(self.descriptions.items(), sizes, strict=True)
        ]
        layer.parts = nn.ModuleList(parts)
        layer.requires_grad_(False)
        self.missing = {(number, key) for number, part in enumerate(parts) for key in part.state_dict()}
        # the folder has an empty "weight" in the place of every structured layer's
        tensors = {"weight": torch.empty(0, dtype=params_dtype)}
        for part in parts:
            tensors |= part.state_dict()
        for key, tensor in tensors.items():
            placeholder: Any = nn.Parameter(torch.empty(0, dtype=tensor.dtype), requires_grad=False)
            placeholder.weight_loader = partial(self._load, layer, key)
            layer.register_parameter(key, placeholder)
        self.placeholders = list(tensors)

    def _load(self, layer: Any, key: str, _: Tensor, loaded: Tensor, part: str | int | None = None) -> None:
        part = getattr(loaded, "shard_id", None) if part is None else part
        number = 0 if part is None else _PARTS[part] if isinstance(part, str) else part
        name = [*self.descriptions][number]
        target = layer.parts[number].state_dict().get(key)
        if target is None:
            if loaded.numel():
                raise ValueError(f"{name} is described as structured, but the folder has a {key} for it")
            return
        if target.shape != loaded.shape:
            described = f"{tuple(target.shape)} for the structure in config.json"
            raise ValueError(f"{name}.{key} has the shape {tuple(loaded.shape)} in the folder, but {described}")
        target.copy_(loaded)
        self.missing.discard((number, key))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all weights were loaded, and remove the empty parameters."""
        if self.missing and get_current_vllm_config().load_config.load_format != "dummy":
            names = [*self.descriptions]
            missing = ", ".join(f"{names[number]}.{key}" for number, key in sorted(self.missing))
            raise ValueError(f"the folder lacks weights of structured layers: {missing}")
        for key in self.placeholders:
            delattr(layer, key)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs (tokens, out_features) for inputs (tokens, in_features)."""
        outputs = [part(x) for part in layer.parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return output if bias is None else output + bias


def _part(
    name: str, entry: Mapping[str, Any] | None, in_features: int, out_features: int, is_head: bool, dtype: torch.dtype
) -> nn.Module:
    if entry is None:
        return nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    described, expected = (entry["in_features"], entry["out_features"]), (in_features, out_features)
    # a head's rows are padded
    if described != expected and not (is_head and described[0] == in_features and described[1] <= out_features):
        sizes = f"{described[0]} -> {described[1]} features, but vLLM's layer has {in_features} -> {out_features}"
        raise ValueError(f"{name} is described with {sizes}")
    kind: Callable[..., Linear] = QuantizedLinear if entry.get("precision") else Linear
    # vLLM adds the bias
    return kind(**{**entry, "bias": False}, dtype=dtype)
