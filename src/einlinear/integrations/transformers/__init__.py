"""Models of transformers with structured layers: `save_pretrained` and `from_pretrained` keep them.

config.json describes the structured layers, beside the weights in safetensors. transformers offers no entry point for
its quantizers, so `import einlinear` leaves an import hook that registers ours once transformers is imported. With the
environment variable EINLINEAR_HOOKS=0 it does not; `register` does the same on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from einlinear.import_hooks import when_imported


def register() -> None:
    """Let transformers save and load structured layers now. Imports transformers; needed only with EINLINEAR_HOOKS=0.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    _extend_configs()
    _extend_quantizers()
    _extend_models()


def register_on_import() -> None:
    """Do the same as soon as transformers is imported, without importing it."""
    when_imported("transformers.configuration_utils", _extend_configs)
    when_imported("transformers.quantizers.auto", _extend_quantizers)
    when_imported("transformers.modeling_utils", _extend_models)


def _extend_configs() -> None:
    """Hand the description down to configs inside a folder's config, such as those of CLIP's towers.

    transformers does so only where its auto classes load the text model of a larger one.
    """
    from transformers import configuration_utils

    from einlinear.integrations.transformers.description import METHOD

    # older versions, which have another name for the class, save no structured layers
    base: Any = getattr(configuration_utils, "PreTrainedConfig", None)
    if base is None or base.get_config_dict.__module__ == __name__:
        return
    original = base.get_config_dict.__func__

    @wraps(original, assigned=("__doc__", "__name__", "__qualname__"))
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = original(cls, *args, **kwargs)
        description = config.get("quantization_config")
        is_ours = isinstance(description, Mapping) and description.get("quant_method") == METHOD
        if is_ours and cls.model_type not in ("", config.get("model_type")):
            config = _hand_down(config, description)
        return config, unused

    base.get_config_dict = classmethod(get_config_dict)


def _hand_down(config: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {**_hand_down(value, description), "quantization_config": description}
        if isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config"
        else value
        for key, value in config.items()
    }


def _extend_quantizers() -> None:
    from transformers.quantizers import auto

    from einlinear.integrations.transformers.description import METHOD
    from einlinear.integrations.transformers.quantizer import EinlinearConfig, EinlinearQuantizer

    # old versions have no registry
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING and hasattr(auto, "register_quantizer"):
        auto.register_quantization_config(METHOD)(EinlinearConfig)
        auto.register_quantizer(METHOD)(EinlinearQuantizer)


def _extend_models() -> None:
    from einlinear.integrations.transformers.saving import extend_save_pretrained

    extend_save_pretrained()
