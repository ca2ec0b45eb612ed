"""The language model of arXiv 2406.06248 and arXiv 2410.02117, with any linear layer structured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.structures import DoesNotFit
from einlinear_lab.models.blocks import Layers
from einlinear_lab.models.config import DENSE, ReferenceModel, Shape, TransformerConfig
from einlinear_lab.models.macs import macs_per_token


@dataclass(frozen=True, kw_only=True)
class GPTConfig(TransformerConfig):
    """Config of a `GPT`.

    Attributes:
        d_head: features of an attention head; None: width / heads.
        heads: of the attention; None: width / d_head.
        head_structure: of the head.
        qk_norm: whether queries and keys pass through a LayerNorm.
        normalize: whether the weights of structured layers, all but dense ones, are normalised as by `Linear`.
    """

    NAME = "gpt"
    SEQUENCES = True

    d_head: int | None = 64
    heads: int | None = None
    head_structure: str = DENSE
    qk_norm: bool = True
    normalize: bool = True

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.context is None:
            raise ValueError("a gpt takes sequences of tokens: prepare a text, or name pixels:DATA")
        return GPT(vocab=shape.outputs, context=shape.context, **vars(self))


class GPT(ReferenceModel):
    """Token and learned position embeddings, pre-norm transformer blocks with causal attention, an untied head.

    The branches of the blocks are multiplied by sqrt(3 / depth). Embeddings start with a standard deviation of 1, as in
    torch, like the outputs of all other layers.

    Args:
        vocab: the number of different tokens.
        width: of the residual stream.
        context: the most tokens of a sequence.
        bias: whether linear layers and norms have one.
        config: other attributes of `GPTConfig`.

    Shapes:
        integers (n, t) to logits (n, t, vocab), for t up to `context`.

    Raises:
        ValueError: sizes that do not divide, an unknown structure; on call, a sequence that is too long.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import GPT
        >>> model = GPT(vocab=96, width=128, context=32, structure="btt(rank=2)")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randint(96, (2, 32))).shape
        torch.Size([2, 32, 96])
        >>> model.non_embedding_macs, GPT(vocab=96, width=128, context=32).non_embedding_macs
        (172032, 614400)
    """

    ZERO = ("*.out", "*.fc2", "head")

    def __init__(self, vocab: int, width: int, context: int, *, bias: bool = False, **config: Any) -> None:
        super().__init__()
        c = GPTConfig(width=width, **config)
        heads = c.heads
        if heads is None:
            if c.d_head is None:
                raise ValueError("give d_head, heads or both: neither says how attention is divided into heads")
            if c.d_head < 1 or width % c.d_head:
                raise DoesNotFit(f"a width of {width} cannot be divided into heads of {c.d_head} features")
            heads = width // c.d_head
        self.context = context
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        layers, multiplier = Layers(c, bias=bias), math.sqrt(3 / c.depth)
        self.blocks = layers.blocks(heads=heads, d_head=c.d_head, causal=True, qk_norm=c.qk_norm, multiplier=multiplier)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = layers.single(width, vocab, c.head_structure)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {self.context}")
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token of a sequence that fills the context."""
        return macs_per_token(self, self.context)

    @property
    def non_embedding_macs(self) -> int:
        """`macs` without the head: embeddings are looked up and take none."""
        return macs_per_token(self.blocks, self.context)
