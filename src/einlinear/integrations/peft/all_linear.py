"""`target_modules="all-linear"` of peft, extended to structured layers for configs that can target them."""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners import tuners_utils
from torch import nn

from einlinear.nn import Linear

STRUCTURED = "STRUCTURED"

# peft's own module, where "all-linear" includes only its own classes
_peft: Any = tuners_utils
_original = _peft._maybe_include_all_linear_layers


@wraps(_original, assigned=("__doc__", "__name__", "__qualname__"))
def _include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    conv1d = _peft.Conv1D
    # isinstance takes a tuple in the place of a class
    if peft_config.peft_type == STRUCTURED or Linear in (getattr(peft_config, "_custom_modules", None) or {}):
        _peft.Conv1D = (conv1d, Linear)
    try:
        return _original(peft_config, model)
    finally:
        _peft.Conv1D = conv1d


def extend_all_linear() -> None:
    """Let peft look for structured layers, too."""
    _peft._maybe_include_all_linear_layers = _include_all_linear_layers
