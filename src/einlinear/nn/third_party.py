"""Layers of torch and transformers: the one place that knows their classes, attributes and weight layouts.

No function here imports transformers or reads a weight's shape where the layer states its size: weights that are
divided among processes have other shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn.layer_info import INPUT, VECTOR, LayerInfo, Role, SelfDescribing

EMBEDDING, CONVOLUTION, RECURRENT = "embeddings", "convolutions", "recurrent layers"
PACKED, LINEAR = "packed attention projections", "other linear layers"

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU)
# attention of transformers whose heads are together as wide as the model
_ATTENTION = ("OPTAttention", "GPTNeoXAttention")


def layer_info(module: Any) -> LayerInfo | None:
    """Return the description of a module without its children, or None for an unknown kind."""
    if isinstance(module, SelfDescribing):
        return module.layer_info()
    if is_linear(module):
        fan_in, fan_out = features(module)
        roles = {"weight": Role("hidden", fan_in, fan_out), "bias": VECTOR}
        return LayerInfo(roles, fan_in * fan_out, category=LINEAR)
    if isinstance(module, nn.modules.conv._ConvNd):
        fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
        roles = {"weight": Role("hidden", fan_in, module.out_channels), "bias": VECTOR}
        return LayerInfo(roles, macs=None, category=CONVOLUTION)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        roles = {
            "in_proj_weight": Role("hidden", width, 3 * width),
            "q_proj_weight": Role("hidden", width, width),
            "k_proj_weight": Role("hidden", module.kdim, width),
            "v_proj_weight": Role("hidden", module.vdim, width),
        }
        vectors = dict.fromkeys(("in_proj_bias", "bias_k", "bias_v"), VECTOR)
        return LayerInfo({**roles, **vectors}, macs=None, category=PACKED)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return LayerInfo(macs=None, category=RECURRENT)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return LayerInfo({"weight": INPUT}, category=EMBEDDING)
    if _is_transformers(module, *_ATTENTION):
        # the linear layers inside are modules of their own
        return LayerInfo(macs_per_position=2 * module.config.hidden_size)
    # every library has norms of its own, such as LlamaRMSNorm: the name tells
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return LayerInfo({name: VECTOR for name, _ in module.named_parameters(recurse=False)})
    return None


def is_linear(module: Any) -> bool:
    """Return whether a module is a dense linear layer: `torch.nn.Linear`, a subclass, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Return whether a module is transformers' Conv1D, whose weight has the shape (in_features, out_features)."""
    return _is_transformers(module, "Conv1D")


def features(linear: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, structured or dense."""
    if is_conv1d(linear):
        return int(getattr(linear, "nx", linear.weight.shape[0])), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def weight_matrix(linear: Any) -> Tensor:
    """Return the weight of a dense linear layer as (out_features, in_features); a view for Conv1D."""
    weight: Tensor = linear.weight
    return weight.T.requires_grad_(weight.requires_grad) if is_conv1d(linear) else weight


def as_class(linear: nn.Linear, dense_class: type[nn.Module]) -> nn.Module:
    """Return a `torch.nn.Linear` as a layer of the class that it had before its conversion.

    The class is Conv1D or a subclass of `torch.nn.Linear`. A subclass with a constructor of its own cannot be made
    again: the layer stays a `torch.nn.Linear`.
    """
    if issubclass(dense_class, nn.Linear):
        if dense_class.__init__ is nn.Linear.__init__:
            linear.__class__ = dense_class
        return linear
    with torch.device("meta"):
        # its parameters are replaced below
        conv1d: Any = dense_class(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    conv1d.bias = linear.bias
    return conv1d.train(linear.training)  # type: ignore[no-any-return]


def _is_transformers(module: Any, *names: str) -> bool:
    """Return whether the class of a module is one of transformers, with one of these names."""
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.")
