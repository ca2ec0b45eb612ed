"""The residual MLP of arXiv 2406.06248, section 4, with any linear layer structured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from einlinear_lab.models.blocks import Layers
from einlinear_lab.models.config import FeedForwardConfig, ReferenceModel, Shape


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
    """An input layer, residual blocks and a dense head.

    Args:
        in_features: of the flattened input.
        width: of the residual stream.
        out_features: the number of classes.
        bias: whether linear layers and norms have one.
        config: other attributes of `MLPConfig`.

    Shapes:
        (n, ...) of in_features values, such as images, to (n, out_features).

    Raises:
        ValueError: as `MLPConfig`, or an unknown structure.

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
        self.blocks = layers.blocks()
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.input(x.flatten(1)))))
        return out
