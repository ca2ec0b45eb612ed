"""Models of transformers with structured layers: `save_pretrained` and `from_pretrained` keep them.

config.json describes the structured layers, beside the weights in safetensors. transformers offers no entry point for
its quantizers, so `import einlinear` leaves an import hook that registers ours once transformers is imported. With the
environment variable EINLINEAR_HOOKS=0 it does not; `register` does the same on request.
"""

from __future__ import annotations

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
    from einlinear.integrations.transformers.subconfigs import extend_get_config_dict

    extend_get_config_dict()


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
