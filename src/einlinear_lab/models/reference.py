"""A residual MLP, a vision transformer and a GPT with any linear layer structured.

All three are after arXiv 2406.06248 and 2410.02117, with changes; ``paper=`` builds the published models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.structures import DoesNotFit
from einlinear_lab.models.blocks import Layers
from einlinear_lab.models.config import (
    DENSE,
    PAPER_1,
    PAPER_2,
    FeedForwardConfig,
    ReferenceModel,
    Shape,
    TransformerConfig,
)
from einlinear_lab.models.macs import macs_per_token


@dataclass(frozen=True, kw_only=True)
class MLPConfig(FeedForwardConfig):
    """Config of a `ResidualMLP`; its head is dense.

    Attributes:
        input_structure: of the input layer; None: that of the others.
    """

    NAME = "mlp"

    input_structure: str | None = None

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.context is not None:
            raise ValueError("an mlp takes images or vectors, not sequences of tokens: choose model=gpt")
        return ResidualMLP(in_features=shape.inputs, out_features=shape.outputs, **vars(self))


class ResidualMLP(ReferenceModel):
    """An input layer, residual blocks, a LayerNorm and a dense head.

    ``paper="2406.06248"`` is the published model: a GELU follows the input layer, no LayerNorm precedes the head, and
    dense layers start with a standard deviation of 1 / sqrt(in_features). The input layer learns at a tenth of the rate
    in both. The betas of the paper are options of the training: ``betas=0.9,0.999``.

    Args:
        in_features: of the flattened input.
        width: of the residual stream.
        out_features: the number of classes.
        bias: whether linear layers and norms have one.
        config: other attributes of `MLPConfig`.

    Shapes:
        (n, ...) of in_features values, such as images, to (n, out_features).

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import ResidualMLP
        >>> model = ResidualMLP(784, 64, 10, structure="btt(rank=2)")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randn(8, 1, 28, 28)).shape
        torch.Size([8, 10])
        >>> model.macs, ResidualMLP(784, 64, 10).macs
        (53632, 149120)
    """

    ZERO = ("*.fc2", "head")
    LR_SCALE: ClassVar[Mapping[str, float]] = {"input": 0.1}

    def __init__(self, in_features: int, width: int, out_features: int, *, bias: bool = True, **config: Any) -> None:
        super().__init__()
        c = MLPConfig(width=width, **config)
        layers = Layers(c, bias=bias)
        self.input = layers.single(in_features, width, c.input_structure)
        self.activation = nn.GELU() if c.paper else nn.Identity()
        self.blocks = layers.blocks()
        self.norm = nn.Identity() if c.paper else nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.activation(self.input(x.flatten(1))))))
        return out


@dataclass(frozen=True, kw_only=True)
class ViTConfig(TransformerConfig):
    """Config of a `ViT`; its head is dense.

    Attributes:
        heads: of the attention; `width` is a multiple of them.
        patch_size: side of a square patch in pixels; both sides of an image are multiples of it.
        input_structure: of the layer that embeds patches; None: that of the others.
        qk_norm: whether queries and keys pass through a LayerNorm, which large models need to train stably.
        normalize: whether the weights of structured layers, all but dense ones, are normalised as by `Linear`.
    """

    NAME = "vit"

    heads: int = 4
    patch_size: int = 4
    input_structure: str | None = None
    qk_norm: bool = False
    normalize: bool = False

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.image is None:
            raise ValueError("a vit takes images: choose model=mlp for vectors, model=gpt for sequences of tokens")
        channels, *size = shape.image
        sizes: dict[str, Any] = {"image_size": tuple(size), "channels": channels, "out_features": shape.outputs}
        return ViT(**sizes, **vars(self))


class ViT(ReferenceModel):
    """Patches, learned positions, pre-norm transformer blocks, the mean over tokens, a dense head.

    ``paper="2406.06248"`` changes what is known of the published model: dense layers start with a standard deviation of
    1 / sqrt(in_features). How its positions start and how its tokens are pooled was not compared.

    Args:
        image_size: (height, width) of the images, or one number for square images.
        width: of the residual stream.
        out_features: the number of classes.
        channels: of the images.
        bias: whether linear layers and norms have one.
        config: other attributes of `ViTConfig`.

    Shapes:
        (n, channels, height, width) to (n, out_features).

    Raises:
        ValueError: sizes that do not divide, an unknown structure; on call, images of another size.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import ViT
        >>> model = ViT(32, 64, 10, patch_size=8, structure="monarch(blocks=4)")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.macs, ViT(32, 64, 10, patch_size=8).macs
        (1049216, 2654848)
    """

    ZERO = ("*.query", "*.out", "*.fc2", "head")

    def __init__(
        self,
        image_size: int | tuple[int, int],
        width: int,
        out_features: int,
        *,
        channels: int = 3,
        bias: bool = True,
        **config: Any,
    ) -> None:
        super().__init__()
        c = ViTConfig(width=width, **config)
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        if c.patch_size < 1 or height % c.patch_size or breadth % c.patch_size:
            raise ValueError(
                f"images of {height} x {breadth} cannot be cut into patches of {c.patch_size} x {c.patch_size}"
            )
        self.image_shape, self.patch_size = (channels, height, breadth), c.patch_size
        self.tokens = (height // c.patch_size) * (breadth // c.patch_size)
        layers = Layers(c, bias=bias)
        self.patches = layers.single(channels * c.patch_size**2, width, c.input_structure)
        self.positions = nn.Embedding(self.tokens, width)
        self.blocks = layers.blocks(heads=c.heads, qk_norm=c.qk_norm)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be of shape (n, {expected}), not {tuple(x.shape)}")
        # (n, tokens, width)
        h = self.patches(F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2))
        h = self.blocks(h + self.positions(torch.arange(self.tokens, device=x.device)))
        out: Tensor = self.head(self.norm(h).mean(1))
        return out

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        per_token = macs_per_token(self.patches) + macs_per_token(self.blocks, self.tokens)
        return self.tokens * per_token + macs_per_token(self.head)


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
    PAPERS = (PAPER_1, PAPER_2)

    d_head: int | None = 64
    heads: int | None = None
    head_structure: str = DENSE
    qk_norm: bool = True
    normalize: bool = True

    def _branch_multiplier(self, depth: int) -> float:
        return 1.0 if self.paper == PAPER_1 else math.sqrt(3 / depth)

    def build(self, shape: Shape) -> ReferenceModel:
        return GPT(vocab=shape.outputs, context=self._context(shape), **vars(self))


class GPT(ReferenceModel):
    """Token and learned position embeddings, pre-norm transformer blocks with causal attention, an untied head.

    The branches of the blocks are multiplied by sqrt(3 / depth). Embeddings start with a standard deviation of 1, as in
    torch, like the outputs of all other layers.

    ``paper=`` builds the published models as far as they are known. In both, embeddings start with a standard deviation
    of 0.02 and dense layers with 1 / sqrt(in_features):

    - "2406.06248": the branches have no multiplier.
    - "2410.02117": of the normalised layers only those of the family btt have gammas. With experts, routed="linear" is
      its BTT-MoE and routed="feed_forward" its standard mixture (`einlinear_lab.models.published`). Different here:
      zero-initialised low-rank layers have a zero second factor, not the first; the epsilon of the RMS is 1e-8, not
      1e-6; axes of "einsum" multiply out to the width, instead of being rounded one by one; a BTT of several ranks
      starts with all of them, where one of the published builders starts with the first only.

    Whether the published norms have biases was not compared.

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
        if c.paper:
            for table in (self.embedding, self.positions):
                nn.init.normal_(table.weight, std=0.02)
        layers = Layers(c, bias=bias)
        self.blocks = layers.blocks(heads=heads, d_head=c.d_head, causal=True, qk_norm=c.qk_norm)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = layers.single(width, vocab, c.head_structure)

    def forward(self, tokens: Tensor) -> Tensor:
        length = self._length(tokens)
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    @property
    def non_embedding_macs(self) -> int:
        """`macs` without the head: embeddings are looked up and take none."""
        return macs_per_token(self.blocks, self.context)
