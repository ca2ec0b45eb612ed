"""torchao: `quantize_` of models with structured layers, whose factors it rounds. Importing this registers that."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
)
from torchao.quantization.quant_api import _is_linear
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, IntxChooseQParamsAlgorithm
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER, register_quantize_module_handler

from einlinear.compression.factor_rounding import round_factors
from einlinear.nn.linear import Linear
from einlinear.nn.quantized_linear import QuantizedLinear

_SUPPORTED = (
    "Int8WeightOnlyConfig and IntxWeightOnlyConfig, of 2 to 8 bits, symmetric, with a scale for each row or group, and "
    "Int4WeightOnlyConfig with its default algorithm"
)


def is_structured(module: nn.Module, name: str) -> bool:
    """Return whether a module is a structured layer to quantise: a `filter_fn` of `torchao.quantize_`.

    Raises:
        ValueError: the whole model is one structured layer, which `quantize_` could not replace.

    Example:
        >>> import einlinear as el
        >>> from torchao import quantize_
        >>> from torchao.quantization import Int8WeightOnlyConfig
        >>> model = nn.Sequential(el.Linear(64, 64, "low_rank(rank=8)"), nn.Linear(64, 10))
        >>> quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_structured)
        >>> [type(layer).__name__ for layer in model]
        ['QuantizedLinear', 'Linear']
    """
    if not isinstance(module, Linear) or isinstance(module, QuantizedLinear):
        return False
    if not name:
        raise ValueError("the model is itself a structured layer, which cannot be replaced: use nn.Sequential(layer)")
    return True


def is_linear(module: nn.Module, name: str) -> bool:
    """Return whether a module is a linear layer to quantise, dense or structured: a `filter_fn` of `torchao.quantize_`.

    Raises:
        ValueError: the whole model is one structured layer, which `quantize_` could not replace.
    """
    return is_structured(module, name) or bool(_is_linear(module, name))


def _precision(config: Any) -> str:
    """Return the precision of a `QuantizedLinear` that a config of torchao asks for."""
    bits, granularity = 0, getattr(config, "granularity", None)
    if isinstance(config, Int8WeightOnlyConfig):
        bits = 8
    elif isinstance(config, Int4WeightOnlyConfig):
        if config.int4_choose_qparams_algorithm == Int4ChooseQParamsAlgorithm.TINYGEMM:
            bits, granularity = 4, PerGroup(config.group_size)
    elif (
        isinstance(config, IntxWeightOnlyConfig)
        and config.mapping_type != MappingType.ASYMMETRIC
        and config.intx_choose_qparams_algorithm == IntxChooseQParamsAlgorithm.AFFINE
    ):
        # torch.iinfo knows no integers of fewer than 8 bits
        bits = int(str(config.weight_dtype).removeprefix("torch.int"))
    if bits >= 2 and isinstance(granularity, PerGroup):
        return f"int{bits}(group={granularity.group_size})"
    if bits >= 2 and granularity in (PerRow(), PerAxis(0)):
        return f"int{bits}"
    raise ValueError(f"structured layers cannot be quantised by {config}: they take {_SUPPORTED}")


@torch.no_grad()
def _quantized(layer: Linear, precision: str) -> QuantizedLinear:
    s, factors = layer.structure, layer.factors()
    if factors[0].is_meta:
        raise ValueError("a layer on the meta device has no values to round: load it first")
    like: dict[str, Any] = {"device": factors[0].device, "dtype": factors[0].dtype}
    new = QuantizedLinear(s.in_features, s.out_features, s, layer.bias is not None, precision=precision, **like)
    new.store(round_factors(s, factors, new.formats))
    if new.bias is not None and layer.bias is not None:
        new.bias.copy_(layer.bias).requires_grad_(layer.bias.requires_grad)
    new.dense_class = layer.dense_class
    return new.train(layer.training)


def _extend_handler(config_type: type) -> None:
    """Let the handler of a config take structured layers, too; torchao has one handler for each type of config."""
    original = _QUANTIZE_CONFIG_HANDLER[config_type]

    # torchao looks for parameter_name in the signature
    @wraps(original)
    def transform(module: nn.Module, config: Any, **kwargs: Any) -> nn.Module:
        if not isinstance(module, Linear):
            result: nn.Module = original(module, config, **kwargs)
            return result
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"the layer is quantised already: {module}")
        if parameter := kwargs.get("parameter_name"):
            rule = "the factors of a structured layer are quantised together"
            raise ValueError(f"{rule}: name the layer, without .{parameter}, in FqnToConfig, or use is_linear")
        return _quantized(module, _precision(config))

    register_quantize_module_handler(config_type)(transform)


for _config_type in list(_QUANTIZE_CONFIG_HANDLER):
    _extend_handler(_config_type)
