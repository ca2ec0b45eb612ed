"""Descriptions of layers, also those of torch and transformers: the muP role of each parameter, and MACs.

Layers of this library describe themselves. Sizes are those that a layer states: sharded weights have other shapes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from einlinear.nn.dense_layers import features, is_linear, is_of_transformers
from einlinear.structures import Structure

EMBEDDING, CONVOLUTION, RECURRENT = "embeddings", "convolutions", "recurrent layers"
STRUCTURED, PACKED, LINEAR = "structured layers", "packed attention projections", "other linear layers"
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU)


@dataclass(frozen=True)
class ParameterRole:
    """Role of a parameter in muP (Yang et al., arXiv 2203.03466, table 3). A plain linear layer is always "hidden"."""

    # "input" is a table, such as an embedding, and "output" a matrix with a fixed number of outputs, such as a router
    kind: Literal["input", "hidden", "output", "vector", "unknown"]
    # of the full matrix
    in_features: int = 0
    out_features: int = 0
    # of a structured matrix, and the index of the parameter in `structure.factors`
    structure: Structure | None = None
    factor: int = 0
    # whether the parameter stacks several dense matrices along a first axis
    stacked: bool = False
    # for routers: the name of a weight with the same input, for a base model without experts
    shares_input_with: str | None = None
    # whether a "vector" scales a full matrix, so that the base model may lack it
    is_scalar: bool = False

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("hidden", "output")


INPUT, VECTOR = ParameterRole("input"), ParameterRole("vector")
SCALAR, UNKNOWN = ParameterRole("vector", is_scalar=True), ParameterRole("unknown")


@dataclass(frozen=True)
class LayerInfo:
    """Description of a module without its children: roles of parameters by name, kind in conversion reports, MACs."""

    roles: Mapping[str, ParameterRole] = field(default_factory=dict)
    # for one token; None if they depend on more than the module
    macs: int | None = 0
    # for each pair of tokens of a sequence, as in attention
    macs_per_position: int = 0
    category: str = ""


class SelfDescribing(nn.Module, ABC):
    """Module that describes itself. A base class, since wrappers forward attributes and would count twice."""

    @abstractmethod
    def layer_info(self) -> LayerInfo:
        """Return the description of this module without its children."""


def layer_info(module: Any) -> LayerInfo | None:
    """Return the description of a module without its children, or None for an unknown kind."""
    if isinstance(module, SelfDescribing):
        return module.layer_info()
    if is_linear(module):
        fan_in, fan_out = features(module)
        roles = {"weight": ParameterRole("hidden", fan_in, fan_out), "bias": VECTOR}
        return LayerInfo(roles, fan_in * fan_out, category=LINEAR)
    if isinstance(module, nn.modules.conv._ConvNd):
        fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
        roles = {"weight": ParameterRole("hidden", fan_in, module.out_channels), "bias": VECTOR}
        return LayerInfo(roles, macs=None, category=CONVOLUTION)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        inputs = {"q_proj_weight": width, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
        roles = {name: ParameterRole("hidden", fan_in, width) for name, fan_in in inputs.items()}
        roles["in_proj_weight"] = ParameterRole("hidden", width, 3 * width)
        roles |= dict.fromkeys(("in_proj_bias", "bias_k", "bias_v"), VECTOR)
        return LayerInfo(roles, macs=None, category=PACKED)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return LayerInfo(macs=None, category=RECURRENT)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return LayerInfo({"weight": INPUT}, category=EMBEDDING)
    if is_of_transformers(module, "OPTAttention", "GPTNeoXAttention"):
        # heads are together as wide as the model; the linear layers inside are modules of their own
        return LayerInfo(macs_per_position=2 * module.config.hidden_size)
    # every library has norms of its own, such as LlamaRMSNorm: the name tells
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return LayerInfo({name: VECTOR for name, _ in module.named_parameters(recurse=False)})
    return None
