"""Tells transformers of this library when both are there, whichever of the two is imported first."""

from __future__ import annotations

from einlinear.import_hooks import when_imported


def register() -> None:
    """Extend what was imported of transformers now, and the rest as soon as it is."""
    when_imported("transformers.configuration_utils", _extend_configs)
    when_imported("transformers.quantizers.auto", _extend_registry)
    when_imported("transformers.modeling_utils", _extend_models)


def _extend_registry() -> None:
    from transformers.quantizers import auto

    from einlinear.integrations.transformers.description import METHOD
    from einlinear.integrations.transformers.quantizer import EinlinearConfig, EinlinearQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING and hasattr(auto, "register_quantizer"):  # old versions have none
        auto.register_quantization_config(METHOD)(EinlinearConfig)
        auto.register_quantizer(METHOD)(EinlinearQuantizer)


def _extend_configs() -> None:
    from einlinear.integrations.transformers.parts import extend_get_config_dict

    extend_get_config_dict()


def _extend_models() -> None:
    from einlinear.integrations.transformers.saving import extend_save_pretrained

    extend_save_pretrained()
