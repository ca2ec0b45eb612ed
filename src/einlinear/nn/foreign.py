"""What is known of a module: which of its parameters are matrices and which are vectors, and what it costs.

Layers of this library say it themselves, in a method `known`; those of torch and transformers are listed below. The
roles of muP and the counting of MACs both read it, so that a new kind of layer is described once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from einlinear.structures import Structure

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_OF_VECTORS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
)

_ATTENTION = ("OPTAttention", "GPTNeoXAttention")  # of transformers: its heads are as wide as the model, all together


@dataclass(frozen=True)
class Matrix:
    """A parameter that is a matrix, or a factor of a structured one.

    Attributes:
        in_features, out_features: of the whole matrix.
        structure, factor: of a structured matrix, what it is, and which of `structure.factors` the parameter is, or a
            stack of them along a first axis.
        beside: of a router, the weight in or below its module that has the same input: a base of dense layers has that
            one alone. Routers start at zero.
        stacked: whether the parameter is several such matrices, along a first axis. (Factors are stacked where they
            have an axis more.)
    """

    in_features: int
    out_features: int
    structure: Structure | None = None
    factor: int = 0
    beside: str | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a module without its children.

    Attributes:
        matrices: of its own parameters, those that are matrices or factors of them, by name.
        vectors: the names of those that are looked up, added or multiplied elementwise, so that they have no fan-in.
        macs: multiply-accumulates that one token takes; None where they depend on more than the module.
        macs_per_position: those that every token takes for each token of its sequence, as in attention.
        scalars: the names of those that scale whole matrices, which a base need not have.
    """

    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    vectors: Collection[str] = ()
    macs: int | None = 0
    macs_per_position: int = 0
    scalars: Collection[str] = ()


class Described(nn.Module, ABC):
    """A module that says itself what it is. (A base class: wrappers pass on attributes, which would count twice.)"""

    @abstractmethod
    def known(self) -> Known:
        """What its parameters are, and what it costs, without its children."""


def known(module: Any) -> Known | None:
    """What is known of a module, or None for one of a kind that nobody has described.

    No weight is looked at for it: where they are divided among processes, their shapes are others.
    """
    if isinstance(module, Described):
        return module.known()
    if isinstance(module, nn.Linear) or is_conv1d(module):
        fan_in, fan_out = features(module)
        return Known({"weight": Matrix(fan_in, fan_out)}, ("bias",), fan_in * fan_out)
    if isinstance(module, _CONVOLUTIONS):
        fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
        return Known({"weight": Matrix(fan_in, module.out_channels)}, ("bias",), macs=None)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        matrices = {
            "in_proj_weight": Matrix(width, 3 * width),
            "q_proj_weight": Matrix(width, width),
            "k_proj_weight": Matrix(module.kdim, width),
            "v_proj_weight": Matrix(module.vdim, width),
        }
        return Known(matrices, ("in_proj_bias", "bias_k", "bias_v"), macs=None)
    if _is_of_transformers(module, *_ATTENTION):  # the linear layers in them are modules of their own
        return Known(macs_per_position=2 * module.config.hidden_size)
    # every library has norms of its own (LlamaRMSNorm): they are known by their name
    if isinstance(module, _OF_VECTORS) or type(module).__name__.endswith("Norm"):
        return Known(vectors=dict(module.named_parameters(recurse=False)))
    return None


def is_conv1d(module: Any) -> bool:
    """Whether it is transformers' Conv1D, a linear layer of weight (in_features, out_features)."""
    return _is_of_transformers(module, "Conv1D")


def _is_of_transformers(module: Any, *names: str) -> bool:
    """Whether it is of one of transformers' classes of these names, without importing transformers."""
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.")


def features(linear: Any) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, structured or not."""
    if is_conv1d(linear):
        return int(getattr(linear, "nx", linear.weight.shape[0])), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)
