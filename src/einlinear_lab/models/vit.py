"""The vision transformer of arXiv 2406.06248, section 4 and appendix, with any linear layer structured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear_lab.models.blocks import Layers
from einlinear_lab.models.config import ReferenceModel, Shape, TransformerConfig
from einlinear_lab.models.macs import macs_per_token


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
        channels, height, width = shape.image
        sizes: dict[str, Any] = {"image_size": (height, width), "channels": channels, "out_features": shape.outputs}
        return ViT(**sizes, **vars(self))


class ViT(ReferenceModel):
    """Patches, learned positions, pre-norm transformer blocks, the mean over tokens, a dense head.

    A linear layer embeds the patches, so that all weights are those of linear layers. The mean over tokens replaces a
    class token.

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
