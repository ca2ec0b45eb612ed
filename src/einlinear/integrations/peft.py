"""LoRA of peft on structured layers: trainable low-rank products beside frozen factors."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from einlinear.nn import Linear
from einlinear.nn.third_party import is_conv1d

# other initialisations change the dense weight, which a structured layer does not have
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def register(config: LoraConfig) -> LoraConfig:
    """Let a LoRA config target structured layers, by name or as part of "all-linear"; returns it.

    peft does not save this: give `PeftModel.from_pretrained` a config that went through here as well.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> import einlinear as el
        >>> from einlinear.integrations import peft as lora
        >>> model = nn.Sequential(el.Linear(64, 64, "btt"))
        >>> model = get_peft_model(model, lora.register(LoraConfig(r=4, target_modules=["0"])))
        >>> model.get_nb_trainable_parameters()
        (512, 1600)
    """
    config._register_custom_module({Linear: _StructuredLoraLinear})
    return config


# peft recognises a layer that has an adapter already by "Linear" in the name of its class
class _StructuredLoraLinear(LoraLinear):
    """y = structured(x) + B A x * scaling. It cannot be merged: the sum has no such structure."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the dense weight, but a structured layer has "
                f"none: take one of {', '.join(map(repr, _INITIALISATIONS))}"
            )
        # the config sets it for all layers, but a structured one is not transposed
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Linear):
            raise ValueError(
                "LoRA cannot be merged into a structured layer: the sum has no such structure. Call el.densify(model) "
                "first, which makes the layers dense"
            )
        # the layer was made dense
        self.fan_in_fan_out = is_conv1d(base)
        super().merge(safe_merge, adapter_names)


def _extend_all_linear() -> None:
    """Let "all-linear" of a registered config include structured layers: peft includes only its own classes."""
    original: Any = tuners_utils._maybe_include_all_linear_layers
    if original.__module__ == __name__:
        return

    @wraps(original, assigned=("__doc__", "__name__", "__qualname__"))
    def include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
        before = getattr(peft_config, "target_modules", None)
        resolved = original(peft_config, model)
        registered = Linear in (getattr(peft_config, "_custom_modules", None) or {})
        if registered and isinstance(before, str) and before.lower() == "all-linear":
            resolved.target_modules = {*resolved.target_modules, *_structured_targets(model, resolved.task_type)}
        return resolved

    tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers


def _structured_targets(model: Any, task: str | None) -> list[str]:
    """The structured layers that "all-linear" includes: as for dense ones, all but the head and those in adapters."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and task == "SEQ_CLS":
        head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, tuners_utils.BaseTunerLayer)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not head and not name.startswith(tuple(wrapped))
    ]


_extend_all_linear()
