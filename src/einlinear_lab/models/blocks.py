"""Residual blocks of the reference models: feed-forward, self-attention, and one after the other.

All are x + multiplier * branch(norm(x)), shapes (..., width) to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.feed_forward import weights_of
from einlinear.nn.interception import reason_to_call
from einlinear.nn.layer_descriptions import LayerInfo, SelfDescribing
from einlinear.nn.linear import Linear
from einlinear.nn.moe import MoEFeedForward, MoELinear
from einlinear.structures import DoesNotFit, Structure
from einlinear.structures import structure as make_structure
from einlinear_lab.models.config import DENSE, PAPER_2, FeedForwardConfig
from einlinear_lab.models.published import (
    FanInScale,
    PublishedMoEFeedForward,
    PublishedMoELinear,
    published_arguments,
)

# Makes the linear layer of a role, as `Layers.linear` does.
MakeLayer: TypeAlias = Callable[..., nn.Module]


class Layers:
    """Makes the linear layers and blocks of a model from its config: structures, experts, `normalize` and `paper`."""

    def __init__(self, config: FeedForwardConfig, *, bias: bool = True) -> None:
        self.config, self.bias = config, bias

    def linear(self, role: str, in_features: int, out_features: int, *, gamma: bool = True) -> nn.Module:
        """Make a linear layer of the blocks; without gamma if its output is normalised anyway."""
        c = self.config
        structure = c.roles.get(role, c.structure)
        if c.experts is None or c.routed == "feed_forward":
            return self.single(in_features, out_features, structure, gamma=gamma)
        made = self._structure(structure, in_features, out_features)
        sizes = (in_features, out_features, made, c.experts, c.active, self.bias)
        kind = PublishedMoELinear if c.paper else MoELinear
        return kind(*sizes, normalize=self._normalizes(made), gamma=gamma or c.paper is not None)

    def single(
        self, in_features: int, out_features: int, structure: str | None = None, *, gamma: bool = True
    ) -> nn.Module:
        """Make a linear layer without experts, such as the first or last of a model."""
        paper, made = self.config.paper, self._structure(structure, in_features, out_features)
        if made.spec == DENSE:
            return (PublishedDenseLinear if paper else DenseLinear)(in_features, out_features, made, self.bias)
        has_gamma = gamma and (paper != PAPER_2 or made.spec.partition("(")[0] == "btt")
        return Linear(in_features, out_features, made, self.bias, self._normalizes(made), gamma=has_gamma)

    def feed_forward(self) -> nn.Module:
        c = self.config
        multiplier = c.branch_multiplier
        if c.experts is None or c.routed == "linear":
            return ResidualFeedForward(c.width, self.linear, c.expansion, bias=self.bias, multiplier=multiplier)
        made = self._structure(None, c.width, c.expansion * c.width)
        sizes = (c.width, c.experts, c.active, made.spec, c.expansion)
        kind = PublishedMoEFeedForward if c.paper else MoEFeedForward
        return kind(*sizes, bias=self.bias, normalize=self._normalizes(made), multiplier=multiplier)

    def blocks(self, **attention: Any) -> nn.Sequential:
        """Make `depth` blocks: feed-forward alone, or transformer blocks with this config of `Attention`."""
        c = self.config

        def block() -> nn.Module:
            if not attention:
                return self.feed_forward()
            options = {"bias": self.bias, "multiplier": c.branch_multiplier, **attention}
            return TransformerBlock(Attention(c.width, layer=self.linear, **options), self.feed_forward())

        return nn.Sequential(*(block() for _ in range(c.depth)))

    def _structure(self, spec: str | None, in_features: int, out_features: int) -> Structure:
        """Make the structure of a layer, by default that of the config."""
        spec = spec or self.config.structure
        arguments = published_arguments(spec) if self.config.paper else {}
        return make_structure(spec, in_features, out_features, **arguments)

    def _normalizes(self, structure: Structure) -> bool:
        return getattr(self.config, "normalize", False) and structure.spec != DENSE


class DenseLinear(Linear):
    """`Linear` of the structure dense that torch runs: dense models are as fast as those of `torch.nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = self.factors()
        return F.linear(x, weight, self.bias)


class PublishedDenseLinear(FanInScale, DenseLinear):
    """`DenseLinear` as in the code of the papers: a layer with fewer outputs than inputs starts larger."""


class ResidualFeedForward(nn.Module):
    """x + multiplier * fc2(gelu(fc1(norm(x)))), with a hidden layer `expansion` times as wide.

    Two plain structured layers run fused, as those of `einlinear.FeedForward`; all others one after the other.
    """

    def __init__(
        self, width: int, layer: MakeLayer, expansion: int = 4, *, bias: bool = True, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.norm = nn.LayerNorm(width, bias=bias)
        self.fc1 = layer("up", width, expansion * width)
        self.fc2 = layer("down", expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self._network(self.norm(x)), alpha=self.multiplier)

    def _network(self, x: Tensor) -> Tensor:
        up, down = self.fc1, self.fc2
        if isinstance(up, Linear) and isinstance(down, Linear) and not (reason_to_call(up) or reason_to_call(down)):
            return ops.feed_forward(x, weights_of(up), weights_of(down), activation="gelu")
        out: Tensor = down(F.gelu(up(x)))
        return out


class Attention(SelfDescribing):
    """x + multiplier * out(attention(norm(x))): multi-head self-attention, (n, t, width) to the same.

    Scores are multiplied by 8 / d_head instead of 1 / sqrt(d_head), as muP needs (Yang et al., arXiv 2203.03466); the
    two are equal for heads of 64 features. With qk_norm, queries and keys pass through a LayerNorm, which undoes gamma.
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
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in self._projections(h))
        # (n, heads, t, d_head)
        q, k, v = (z.transpose(1, 2) for z in (self.query_norm(q), self.key_norm(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=8 / q.shape[-1])
        return torch.add(x, self.out(mixed.transpose(1, 2).flatten(2)), alpha=self.multiplier)

    def _projections(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of query, key and value: those of plain structured layers in one call."""
        layers = self.query, self.key, self.value
        plain = [layer for layer in layers if isinstance(layer, Linear) and not reason_to_call(layer)]
        if len(plain) == len(layers):
            return ops.shared_input_linear(h, [weights_of(layer) for layer in plain])
        return tuple([layer(h) for layer in layers])

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
