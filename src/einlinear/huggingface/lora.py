"""LoRA of peft on structured layers: small trainable products beside frozen factors."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from einlinear.nn import Linear
from einlinear.nn.known import is_conv1d

# Other ways to start change the dense weight, which a structured layer has not.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def register(config: LoraConfig) -> LoraConfig:
    """Let a LoRA config target structured layers, by name as any others; returns it.

    peft does not save this: give `PeftModel.from_pretrained` a config that went through here as well.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> import einlinear as el
        >>> from einlinear.huggingface import lora
        >>> model = nn.Sequential(el.Linear(64, 64, "btt"))
        >>> model = get_peft_model(model, lora.register(LoraConfig(r=4, target_modules=["0"])))
        >>> model.get_nb_trainable_parameters()
        (512, 1600)
    """
    config._register_custom_module({Linear: _StructuredLora})
    return config


class _StructuredLora(LoraLinear):
    """y = structured(x) + B A x * scaling. It cannot be merged: the sum has no such structure."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the dense weight, but a structured layer has "
                f"none: take one of {', '.join(map(repr, _STARTS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Linear):
            raise ValueError(
                "LoRA cannot be merged into a structured layer: the sum has no such structure. Call el.densify(model) "
                "first, which makes the layers dense"
            )
        self.fan_in_fan_out = is_conv1d(base)  # of a layer that was made dense
        super().merge(safe_merge, adapter_names)
