"""How a part of a saved model, such as a tower, learns of its structured layers.

The config of a part lies inside that of the whole, where `quantization_config` stands once, for all. transformers hands
it down itself where its auto classes load the text model of a larger one; here it is handed down to all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers import configuration_utils

from einlinear.integrations.transformers.description import METHOD


def extend_get_config_dict() -> None:
    """Let the configs inside the one of a folder have its `quantization_config` where one of them is asked for."""
    # older versions, which have another name for it, save no structured layers
    base: Any = getattr(configuration_utils, "PreTrainedConfig", None)
    if base is None or base.get_config_dict.__module__ == __name__:
        return
    original = base.get_config_dict.__func__

    @wraps(original, assigned=("__doc__", "__name__", "__qualname__"))
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = original(cls, *args, **kwargs)
        described = config.get("quantization_config")
        ours = isinstance(described, Mapping) and described.get("quant_method") == METHOD
        if ours and cls.model_type not in ("", config.get("model_type")):
            config = _handed_down(config, described)
        return config, unused

    base.get_config_dict = classmethod(get_config_dict)


def _handed_down(config: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {**_handed_down(value, described), "quantization_config": described}
        if isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config"
        else value
        for key, value in config.items()
    }
