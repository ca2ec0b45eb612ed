"""The language model of arXiv 2406.06248 and arXiv 2410.02117, with any linear layer structured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from einlinear.structures import DoesNotFit
from einlinear_lab.models.blocks import Attention, Layers, TransformerBlock, stack
from einlinear_lab.models.macs import macs_per_token
from einlinear_lab.models.model import ReferenceModel


class GPT(ReferenceModel):
    """Token and learned position embeddings, pre-norm transformer blocks with causal attention, a head of its own.

    Embeddings start with a standard deviation of one, as torch has it: a token is a one-hot input, and features of size
    one are what every other layer gives as well.

    Args:
        vocab: the number of different tokens.
        width: of the residual stream.
        context: the most tokens of a sequence.
        depth: the number of blocks, whose branches are multiplied by sqrt(3 / depth).
        d_head: features of an attention head; None: width / heads.
        heads: of the attention; None: width / d_head.
        structure: of every linear layer of the blocks, as for `Linear`.
        head_structure: of the head.
        expansion: of the blocks' hidden layer.
        bias: whether linear layers and norms have one.
        qk_norm: whether queries and keys pass through a LayerNorm.
        normalize: whether the weights of structured layers, that is all but dense ones, are normalised as by `Linear`.
        experts: makes mixtures of so many experts; None: none.
        active: how many of them a token goes to.
        routed: what is a mixture, see `Layers`: "linear", "feed_forward" or "both".
        roles: structures of some roles of the linear layers, instead of `structure`: "attention_in" (queries, keys,
            values), "attention_out", "up" and "down" (of the feed-forward networks).

    Shapes:
        integers (n, t) to logits (n, t, vocab), for t up to `context`.

    Raises:
        ValueError: sizes that do not divide as they must, an unknown structure; on call, a sequence that is too long.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import GPT
        >>> model = GPT(vocab=96, width=128, context=32, structure="btt(rank=2)", normalize=True)
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randint(96, (2, 32))).shape
        torch.Size([2, 32, 96])
        >>> model.non_embedding_macs, GPT(vocab=96, width=128, context=32).non_embedding_macs
        (172032, 614400)
    """

    ZERO = ("*.out", "*.fc2", "head")

    def __init__(
        self,
        vocab: int,
        width: int,
        context: int,
        *,
        depth: int = 3,
        d_head: int | None = 64,
        heads: int | None = None,
        structure: str = "dense",
        head_structure: str = "dense",
        expansion: int = 4,
        bias: bool = False,
        qk_norm: bool = True,
        normalize: bool = False,
        experts: int | None = None,
        active: int = 2,
        routed: str = "linear",
        roles: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if heads is None:
            if d_head is None:
                raise ValueError("give d_head, heads or both: neither says how attention is divided into heads")
            if d_head < 1 or width % d_head:
                raise DoesNotFit(f"a width of {width} cannot be divided into heads of {d_head} features")
            heads = width // d_head
        self.context = context
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        layers = Layers(structure, bias, normalize, experts, active, routed, roles or {})

        def block() -> TransformerBlock:
            multiplier = math.sqrt(3 / depth)
            attention = Attention(
                width,
                heads,
                layers.linear,
                d_head=d_head,
                bias=bias,
                causal=True,
                qk_norm=qk_norm,
                multiplier=multiplier,
            )
            return TransformerBlock(attention, layers.feed_forward(width, expansion, multiplier))

        self.blocks = stack(depth, block)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = layers.single(width, vocab, head_structure)

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
