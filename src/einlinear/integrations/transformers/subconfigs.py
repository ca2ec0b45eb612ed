"""Configs of submodels, such as the towers of CLIP: each gets the description of the structured layers.

The config of a submodel lies inside that of the model, where `quantization_config` stands once. transformers hands it
down where its auto classes load the text model of a larger one; this module hands it down to all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers import configuration_utils

from einlinear.integrations.transformers.description import METHOD


def extend_get_config_dict() -> None:
    """Give the configs inside a folder's config its `quantization_config` when one of them is loaded."""
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
