"""The method STRUCTURED of peft: adapters of any structure, y = W x + scale * S x, configured by one line of text."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from einlinear.adapters.adaptation import check_numbers, reason_not_to_adapt
from einlinear.adapters.adapted_linear import Adapter
from einlinear.adapters.merging import merged_weight, reason_not_to_merge
from einlinear.integrations.peft.all_linear import STRUCTURED
from einlinear.nn import Linear
from einlinear.nn.dense_layers import features, is_conv1d, is_linear
from einlinear.structures.spec import check_spec

_PREFIX = "structured_"


# peft's own enum cannot have new members; those of any enum of text equal the text in its registries
class StructuredPeftType(str, Enum):
    """The name of the method in peft's registries and in adapter_config.json."""

    STRUCTURED = STRUCTURED


@dataclass
class StructuredConfig(PeftConfig):
    """Config of adapters of any structure for `peft.get_peft_model`, saved in adapter_config.json.

    S starts at zero. The structure "low_rank(rank=r)" with scale = alpha / r is LoRA, "kronecker" is LoKr without its
    low-rank decompositions.

    Args:
        structure: of S in all target modules: a spec such as "monarch(blocks=4)", or a pattern.
        scale: what S x is multiplied by.
        dropout: the probability that an input of S is zero in training.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`,
            "all-linear" included; structured layers can be targets. None: as LoRA has for the model.

    Raises:
        ValueError, TypeError: a structure that is unknown or no text, scale or dropout out of range.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from einlinear.integrations.peft import StructuredConfig
        >>> config = StructuredConfig(structure="monarch", target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)
        >>> model.get_nb_trainable_parameters()
        (2048, 6208)
    """

    structure: str = ""
    scale: float = 1.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type: Any = StructuredPeftType.STRUCTURED
        if not self.structure:
            raise ValueError("StructuredConfig needs the structure of the adapters, such as 'monarch(blocks=4)'")
        check_spec(self.structure)
        check_numbers(self.scale, self.dropout)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where the numbers of layers are: give layers_to_transform as well")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))


# peft recognises a layer that has an adapter already by "Linear" in the name of its class
class StructuredAdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of peft's method STRUCTURED: the sum of the layer and of the active adapters."""

    adapter_layer_names = ("structured_adapters",)
    unmerged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: StructuredConfig) -> None:
        super().__init__()
        self.base_layer, self.structured_adapters = base_layer, nn.ModuleDict()
        self.in_features, self.out_features = features(self.get_base_layer())
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: StructuredConfig) -> None:
        """Add an adapter that starts at zero."""
        weight: Any = self.weight
        dtype = weight.dtype if weight.is_floating_point() else None
        size, device = (self.in_features, self.out_features), weight.device
        adapter = Adapter(*size, config.structure, config.scale, config.dropout, device=device, dtype=dtype)
        self.structured_adapters[adapter_name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.structured_adapters:
                    y = self.structured_adapters[name].add_to(y, x)  # type: ignore[operator]
        return y

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the weight of the base layer, in its shape and dtype."""
        base: Any = self.get_base_layer()
        matrix: Tensor = self.structured_adapters[adapter_name].dense_weight()  # type: ignore[operator]
        return (matrix.T if is_conv1d(base) else matrix).to(base.weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight of the base layer; sums that are not finite are always refused."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.structured_adapters]
        if not names:
            return
        base: Any = self.get_base_layer()
        if reason := reason_not_to_merge(base):
            raise ValueError(reason)
        total = merged_weight(base, [self.structured_adapters[name].dense_weight() for name in names])  # type: ignore[operator]
        if total is None:
            raise ValueError(f"the sum of the weight and of {', '.join(names)} has entries that are not finite")
        if self.unmerged_weight is None:
            self.unmerged_weight = base.weight.detach().clone()
        base.weight.copy_(total)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight of the base layer, bit for bit."""
        if self.unmerged_weight is None:
            warnings.warn("no adapter is merged", stacklevel=2)
            return
        self.get_base_layer().weight.copy_(self.unmerged_weight)  # type: ignore[operator]
        self.unmerged_weight, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class StructuredModel(BaseTuner):
    """Model with adapters of peft's method STRUCTURED, which `peft.get_peft_model` makes of a `StructuredConfig`."""

    prefix = _PREFIX
    tuner_layer_cls = StructuredAdapterLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        try:
            if isinstance(target, StructuredAdapterLinear):
                target.update_layer(adapter_name, peft_config)
                return
            base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if not isinstance(base, Linear) and not is_linear(base):
                raise TypeError(f"is a {type(base).__name__}, and no linear layer")
            if reason := reason_not_to_adapt(base, adapter_name):
                raise ValueError(reason)
            layer = StructuredAdapterLinear(target, adapter_name, peft_config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}; exclude_modules leaves it out") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        # before the first layer is merged
        for name, layer in self.model.named_modules():
            if isinstance(layer, StructuredAdapterLinear) and (reason := reason_not_to_merge(layer.get_base_layer())):
                raise ValueError(f"{name}: {reason}")


def register_method() -> None:
    """Put the method into peft's registries, where `PeftModel.from_pretrained` finds it."""
    registries: Any = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for registry, value in zip(registries, (StructuredConfig, StructuredModel, _PREFIX), strict=True):
        registry[STRUCTURED] = value
