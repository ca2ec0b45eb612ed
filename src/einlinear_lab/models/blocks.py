"""Residual blocks, which the reference models are made of: feed-forward, self-attention, and one after the other.

All are x + multiplier * branch(norm(x)), shapes (..., width) to the same. Their linear layers are made by a function
that they are given, so that no block needs to know what kinds of layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.nn.layer_info import LayerInfo, SelfDescribing
from einlinear.nn.linear import Linear
from einlinear.nn.moe import MoEFeedForward, MoELinear
from einlinear.nn.moe.mixture import check_experts
from einlinear.structures import DoesNotFit, Structure
from einlinear.structures import structure as make_structure

ROUTED = ("linear", "feed_forward", "both")
# what linear layers make: queries, keys and values; the attention's output; a feed-forward's hidden layer; its output
ROLES = ("attention_in", "attention_out", "up", "down")


class MakeLayer(Protocol):
    """Makes the linear layer of a role; without gamma where its output is normalised anyway."""

    def __call__(self, role: str, in_features: int, out_features: int, *, gamma: bool = True) -> nn.Module: ...


@dataclass(frozen=True)
class Layers:
    """Makes the layers of a model: of a structure, and mixtures of experts where that is asked for.

    Attributes:
        structure: of every linear layer, or of every expert.
        bias: whether linear layers and norms have one; experts that are whole networks have none.
        normalize: whether the weights of structured layers, that is all but dense ones, are normalised as by `Linear`.
        experts: how many; None for none.
        active: how many of them a token goes to.
        routed: which parts are mixtures: "linear", every linear layer; "feed_forward", whole feed-forward networks;
            "both", these and every linear layer of the attention.
        roles: structures of some of the `ROLES`, instead of `structure`.

    Raises:
        ValueError: another `routed` or role, fewer experts than one, more active ones than experts, experts that are
            whole networks with structures for their roles.
    """

    structure: str
    bias: bool = True
    normalize: bool = False
    experts: int | None = None
    active: int = 2
    routed: str = ROUTED[0]
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(self.roles.keys() - set(ROLES)):
            raise ValueError(f"roles must be {', '.join(ROLES)}, not {', '.join(unknown)}")
        if self.routed not in ROUTED:
            raise ValueError(f"routed must be {' or '.join(ROUTED)}, not {self.routed!r}")
        if self.experts is not None:
            check_experts(self.experts, self.active)
            if self.routed != "linear" and self.roles.keys() & {"up", "down"}:
                raise ValueError("experts that are whole networks have one structure: leave out roles up and down")

    def linear(self, role: str, in_features: int, out_features: int, *, gamma: bool = True) -> nn.Module:
        """A linear layer of the attention, or of a feed-forward network that is no expert."""
        structure = self.roles.get(role, self.structure)
        if self.experts is None or self.routed == "feed_forward":
            return self.single(in_features, out_features, structure, gamma=gamma)
        made = make_structure(structure, in_features, out_features)
        normalize = self._normalizes(made)
        experts, active = self.experts, self.active
        return MoELinear(in_features, out_features, made, experts, active, self.bias, normalize=normalize, gamma=gamma)

    def single(
        self, in_features: int, out_features: int, structure: str | None = None, *, gamma: bool = True
    ) -> nn.Module:
        """A linear layer without experts, such as the first or last of a model; by default of the same structure."""
        made = make_structure(structure or self.structure, in_features, out_features)
        return Linear(in_features, out_features, made, self.bias, self._normalizes(made), gamma=gamma)

    def feed_forward(self, width: int, expansion: int, multiplier: float = 1.0) -> nn.Module:
        """A feed-forward block."""
        if self.experts is None or self.routed == "linear":
            return FeedForward(width, self.linear, expansion, bias=self.bias, multiplier=multiplier)
        return MoEFeedForward(
            width,
            self.experts,
            self.active,
            self.structure,
            expansion,
            bias=self.bias,
            normalize=self._normalizes(make_structure(self.structure, width, expansion * width)),
            multiplier=multiplier,
        )

    def _normalizes(self, structure: Structure) -> bool:
        return self.normalize and structure.spec != "dense"


class FeedForward(nn.Module):
    """x + multiplier * fc2(gelu(fc1(norm(x)))), with a hidden layer `expansion` times as wide."""

    def __init__(
        self, width: int, layer: MakeLayer, expansion: int = 4, *, bias: bool = True, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.norm = nn.LayerNorm(width, bias=bias)
        self.fc1 = layer("up", width, expansion * width)
        self.fc2 = layer("down", expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.fc2(F.gelu(self.fc1(self.norm(x)))), alpha=self.multiplier)


class Attention(SelfDescribing):
    """x + multiplier * out(attention(norm(x))): multi-head self-attention, (n, t, width) to the same.

    Scores are multiplied by 8 / d_head rather than 1 / sqrt(d_head): the same for heads of 64 features, and right for
    all others under muP (Yang et al., arXiv 2203.03466), since a query and its key correlate.

    Args:
        width: of the residual stream.
        heads: how many.
        layer: makes the four linear layers; those of queries and keys without gamma if qk_norm undoes it.
        d_head: features of a head; by default width / heads, which has to be a whole number.
        bias: whether norms have one.
        causal: whether a token sees only itself and those before it.
        qk_norm: whether every head's queries and keys pass through a LayerNorm.
        multiplier: of the branch.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer: MakeLayer,
        *,
        d_head: int | None = None,
        bias: bool = True,
        causal: bool = False,
        qk_norm: bool = False,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if heads < 1 or (d_head is None and width % heads):
            raise DoesNotFit(f"a width of {width} cannot be divided into {heads} heads")
        d_head = d_head or width // heads
        self.heads, self.features, self.causal, self.multiplier = heads, heads * d_head, causal, multiplier
        self.norm = nn.LayerNorm(width, bias=bias)
        self.query = layer("attention_in", width, self.features, gamma=not qk_norm)
        self.key = layer("attention_in", width, self.features, gamma=not qk_norm)
        self.value = layer("attention_in", width, self.features)
        self.out = layer("attention_out", self.features, width)
        self.query_norm = nn.LayerNorm(d_head, bias=bias) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(d_head, bias=bias) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        q, k, v = (z.transpose(1, 2) for z in (self.query_norm(q), self.key_norm(k), v))  # (n, heads, t, d_head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=8 / q.shape[-1])
        return torch.add(x, self.out(mixed.transpose(1, 2).flatten(2)), alpha=self.multiplier)

    def layer_info(self) -> LayerInfo:
        return LayerInfo(macs_per_position=2 * self.features)


class TransformerBlock(nn.Module):
    """Self-attention, then feed-forward: (n, t, width) to the same."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.attention(x))
        return out


def stack(depth: int, block: Callable[[], nn.Module]) -> nn.Sequential:
    """So many blocks, one after the other."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    return nn.Sequential(*(block() for _ in range(depth)))
