"""The vision transformer of arXiv 2406.06248, section 4 and appendix, with any linear layer structured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear_lab.models.blocks import Attention, Layers, TransformerBlock, stack
from einlinear_lab.models.macs import macs_per_token
from einlinear_lab.models.model import ReferenceModel


class ViT(ReferenceModel):
    """Patches, learned positions, pre-norm transformer blocks, the mean over tokens, a dense head.

    Patches are cut out by reshaping and embedded by a linear layer, so that all weights are those of linear layers. The
    mean over tokens stands where others have a class token: it is one kind of parameter less, and the number of tokens
    stays that of the patches.

    Args:
        image_size: (height, width) of the images, or one number if they are square.
        width: of the residual stream; a multiple of `heads`.
        out_features: the number of classes.
        channels: of the images.
        patch_size: side of a square patch; both sides of an image are multiples of it.
        depth: the number of blocks.
        heads: of the attention.
        structure: of every linear layer but the head, as for `Linear`.
        expansion: of the blocks' hidden layer.
        bias: whether linear layers and norms have one.
        qk_norm: whether queries and keys pass through a LayerNorm, which large models need to train stably.
        normalize: whether the weights of structured layers, that is all but dense ones, are normalised as by `Linear`.
        input_structure: of the layer that embeds patches; by default that of the others.
        experts: makes mixtures of so many experts; None: none.
        active: how many of them a token goes to.
        routed: what is a mixture, see `Layers`: "linear", "feed_forward" or "both".
        roles: structures of some roles of the linear layers, instead of `structure`: "attention_in" (queries, keys,
            values), "attention_out", "up" and "down" (of the feed-forward networks).

    Shapes:
        (n, channels, height, width) to (n, out_features).

    Raises:
        ValueError: sizes that do not divide as they must, an unknown structure; on call, images of another size.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import ViT
        >>> model = ViT(32, 64, 10, structure="monarch(blocks=4)")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.macs, ViT(32, 64, 10).macs
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
        patch_size: int = 8,
        depth: int = 3,
        heads: int = 8,
        structure: str = "dense",
        expansion: int = 4,
        bias: bool = True,
        qk_norm: bool = False,
        normalize: bool = False,
        input_structure: str | None = None,
        experts: int | None = None,
        active: int = 2,
        routed: str = "linear",
        roles: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size < 1 or rows % patch_size or columns % patch_size:
            raise ValueError(f"images of {rows} x {columns} cannot be cut into patches of {patch_size} x {patch_size}")
        self.image_shape, self.patch_size = (channels, rows, columns), patch_size
        self.tokens = (rows // patch_size) * (columns // patch_size)
        layers = Layers(structure, bias, normalize, experts, active, routed, roles or {})
        self.patches = layers.single(channels * patch_size**2, width, input_structure)
        self.positions = nn.Embedding(self.tokens, width)

        def block() -> TransformerBlock:
            attention = Attention(width, heads, layers.linear, bias=bias, qk_norm=qk_norm)
            return TransformerBlock(attention, layers.feed_forward(width, expansion))

        self.blocks = stack(depth, block)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be of shape (n, {expected}), not {tuple(x.shape)}")
        h = self.patches(F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2))  # (n, tokens, width)
        h = self.blocks(h + self.positions(torch.arange(self.tokens, device=x.device)))
        out: Tensor = self.head(self.norm(h).mean(1))
        return out

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        per_token = macs_per_token(self.patches) + macs_per_token(self.blocks, self.tokens)
        return self.tokens * per_token + macs_per_token(self.head)
