"""The residual multilayer perceptron of arXiv 2406.06248, section 4: one file, any linear layer structured."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.nn.linear import Linear


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm(x)))), with a hidden layer `expansion` times as wide."""

    def __init__(self, width: int, structure: str, expansion: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=bias)
        self.fc1 = Linear(width, expansion * width, structure, bias)
        self.fc2 = Linear(expansion * width, width, structure, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class ResidualMLP(nn.Module):
    """An input layer, residual blocks and a dense head.

    Args:
        in_features: of the flattened input.
        width: of the residual stream.
        out_features: the number of classes.
        depth: the number of blocks.
        structure: of every linear layer but the head, as for `Linear`.
        expansion: of the blocks' hidden layer.
        bias: whether linear layers and norms have one.

    Shapes:
        (n, in_features) to (n, out_features).
    """

    ZERO = ("*.fc2", "head")  # what structure-aware initialisation sets to zero: branches' last layers and the head

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        depth: int = 3,
        structure: str = "dense",
        expansion: int = 4,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.input = Linear(in_features, width, structure, bias)
        self.blocks = nn.Sequential(*(Block(width, structure, expansion, bias) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.input(x))))
        return out
