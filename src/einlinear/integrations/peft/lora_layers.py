"""LoRA of peft on structured layers: trainable low-rank products beside frozen factors."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from einlinear.nn import Linear
from einlinear.nn.dense_layers import is_conv1d

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
        start = config.init_lora_weights
        if start not in _INITIALISATIONS:
            raise ValueError(f"init_lora_weights={start!r} changes the dense weight: allowed are {_INITIALISATIONS}")
        # the config sets it for all layers, but a structured one is not transposed
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Linear):
            raise ValueError("LoRA cannot be merged into a structured layer: first make it dense, el.densify(model)")
        self.fan_in_fan_out = is_conv1d(base)
        super().merge(safe_merge, adapter_names)
