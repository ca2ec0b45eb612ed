"""The weights of the layers of a feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from einlinear.structures import Structure


class Weights(NamedTuple):
    """The weights of one layer of a feed-forward block, as `linear` takes them."""

    structure: Structure
    factors: Sequence[Tensor]
    bias: Tensor | None = None
