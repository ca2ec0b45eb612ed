"""Models of transformers with structured layers: `save_pretrained` and `from_pretrained` keep them."""

from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Any

from einlinear.import_hooks import when_imported

METHOD = "einlinear"


def register() -> None:
    """Let transformers, which has to be installed, save and load structured layers; needed with EINLINEAR_HOOKS=0."""
    for hook in _HOOKS.values():
        hook()


def register_on_import() -> None:
    """Do the same as soon as transformers is imported."""
    for module, hook in _HOOKS.items():
        when_imported(f"transformers.{module}", hook)


def _patch_configs() -> None:
    """Hand the description down to configs inside a folder's config, such as those of CLIP's towers."""
    from transformers import configuration_utils

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


def _patch_quantizers() -> None:
    from transformers.quantizers import auto

    # old versions have no such registry, or none of what it needs
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING and find_spec("transformers.conversion_mapping"):
        from einlinear.integrations.transformers.quantizer import EinlinearConfig, EinlinearQuantizer

        auto.register_quantization_config(METHOD)(EinlinearConfig)
        auto.register_quantizer(METHOD)(EinlinearQuantizer)


def _patch_models() -> None:
    from einlinear.integrations.transformers.saving import extend_save_pretrained

    extend_save_pretrained()


def _patch_styles() -> None:
    # older versions have other styles
    if find_spec("transformers.distributed.mixin"):
        from einlinear.integrations.transformers.parallel_styles import extend_styles

        extend_styles()


# by the module of transformers that they patch
_HOOKS = {
    "configuration_utils": _patch_configs,
    "quantizers.auto": _patch_quantizers,
    "modeling_utils": _patch_models,
    # registers all styles
    "distributed.mixin": _patch_styles,
}
