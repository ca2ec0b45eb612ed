"""Quantizer of transformers that makes structured layers in `from_pretrained`.

transformers calls it before the weights are loaded, to replace layers, and afterwards. Then it removes all that marks
the model as quantised: the model can be trained, compiled, cast and saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from einlinear.integrations.transformers.description import METHOD, check, forget, restore

if TYPE_CHECKING:
    # imports the registry, in which this module registers
    from transformers.modeling_utils import PreTrainedModel


class EinlinearConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, checked."""

    def __init__(self, version: Any = None, layers: Any = None, quant_method: str = METHOD, **unknown: Any) -> None:
        if unknown:
            raise ValueError(f"quantization_config: unknown {', '.join(unknown)}; it has quant_method, version, layers")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own ones are an enumeration
        self.version, self.layers = version, check(version, layers)


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
                "quantization_config is for folders with structured layers, and is read from there. Load the dense "
                "model without it, then call el.convert(model, structure)"
            )
        self.names: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        prefix = model.base_model_prefix
        # a model of another class has another head, or is a submodel, whose config names no class
        partial = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
        self.names = restore(model, self.quantization_config.layers, prefix, partial, _renaming(model))
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        # the guards of saving.py, whose names may have the prefix in the file and not in the model
        bodies = {re.escape(name.removeprefix(f"{prefix}.")) for name in self.names.values()}
        ignored = {rf"(^|\.){body}\.weight$" for body in bodies}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # parameters that were not in the checkpoint, or had another shape, would be random: transformers marks the
        # ones that it loaded; those on the meta device are read from disk at every use
        for name in self.names.values():
            for key, parameter in model.get_submodule(name).named_parameters():
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise ValueError(
                        f"{name} is described as a structured layer, but {name}.{key} of shape "
                        f"{tuple(parameter.shape)} did not come from the checkpoint: it is missing there, or has "
                        "another shape"
                    )
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        forget(model.config)

    def is_serializable(self) -> bool:
        return True


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """The map from names in a folder to names in this model: transformers removes the prefixes of some submodels."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def rename(name: str) -> str:
        key = f"{name}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(".weight")

    return rename
