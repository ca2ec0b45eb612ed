"""Kinds of layers of torch and transformers: the muP role of each parameter, and MACs.

Layers of this library describe themselves. Sizes are those that a layer states: sharded weights have other shapes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    if _is_transformers(module, "OPTAttention", "GPTNeoXAttention"):
        # heads are together as wide as the model; the linear layers inside are modules of their own
        return LayerInfo(macs_per_position=2 * module.config.hidden_size)
    # every library has norms of its own, such as LlamaRMSNorm: the name tells
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return LayerInfo({name: VECTOR for name, _ in module.named_parameters(recurse=False)})
    return None


def is_linear(module: Any) -> bool:
    """Return whether a module is a dense linear layer: `torch.nn.Linear` or a subclass, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Return whether a module is transformers' Conv1D, with a weight of shape (in_features, out_features)."""
    return _is_transformers(module, "Conv1D")


def features(linear: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, structured or dense."""
    if is_conv1d(linear):
        return int(getattr(linear, "nx", linear.weight.shape[0])), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def weight_matrix(linear: Any) -> Tensor:
    """Return the weight of a dense linear layer as (out_features, in_features); a view for Conv1D. Else TypeError."""
    if not is_linear(linear):
        kind = type(linear).__name__
        raise TypeError(f"expected an nn.Linear, a Conv1D or a weight of shape (out, in), not {kind}")
    weight: Tensor = linear.weight
    return weight.T.requires_grad_(weight.requires_grad) if is_conv1d(linear) else weight


def as_class(linear: nn.Linear, dense_class: type[nn.Module]) -> nn.Module:
    """Return a `torch.nn.Linear` as a Conv1D, or as a subclass unless it has a constructor of its own."""
    if issubclass(dense_class, nn.Linear):
        if dense_class.__init__ is nn.Linear.__init__:
            linear.__class__ = dense_class
        return linear
    with torch.device("meta"):
        conv1d: Any = dense_class(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    conv1d.bias = linear.bias
    return conv1d.train(linear.training)  # type: ignore[no-any-return]


def _is_transformers(module: Any, *names: str) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.")
