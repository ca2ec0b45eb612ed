"""The residual MLP of arXiv 2406.06248, section 4, with any linear layer structured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from einlinear_lab.models.blocks import Layers, stack
from einlinear_lab.models.model import ReferenceModel


class ResidualMLP(ReferenceModel):
    """An input layer, residual blocks and a dense head.

    Args:
        in_features: of the flattened input.
        width: of the residual stream.
        out_features: the number of classes.
        depth: the number of blocks.
        structure: of every linear layer but the head, as for `Linear`.
        expansion: of the blocks' hidden layer.
        bias: whether linear layers and norms have one.
        input_structure: of the input layer; by default that of the others.
        experts: makes mixtures of so many experts; None: none.
        active: how many of them a token goes to.
        routed: what is a mixture, see `Layers`: "linear" or "feed_forward".
        roles: structures of some roles of the linear layers, instead of `structure`: "up" and "down".

    Shapes:
        (n, ...) of in_features values, such as images, to (n, out_features).

    Raises:
        ValueError: a depth below 1, an unknown structure.

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

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        depth: int = 3,
        structure: str = "dense",
        expansion: int = 4,
        bias: bool = True,
        input_structure: str | None = None,
        experts: int | None = None,
        active: int = 2,
        routed: str = "linear",
        roles: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if roles and (unknown := roles.keys() - {"up", "down"}):
            raise ValueError(f"roles must be up and down, not {', '.join(sorted(unknown))}: a MLP has no attention")
        layers = Layers(structure, bias, False, experts, active, routed, roles or {})
        self.input = layers.single(in_features, width, input_structure)
        self.blocks = stack(depth, lambda: layers.feed_forward(width, expansion))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.input(x.flatten(1)))))
        return out
