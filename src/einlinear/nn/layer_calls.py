"""Who computes calls of structured layers: the layers themselves, or a fused block of `einlinear.fusion`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from einlinear.nn.linear import Linear


class LayerCalls(ABC):
    """Interface that takes over calls of layers, in one thread or task, while it is `CURRENT`."""

    @abstractmethod
    def compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        """Return the output of a layer, or None if the layer has to compute it."""


CURRENT: ContextVar[LayerCalls | None] = ContextVar("einlinear.layer_calls", default=None)


def compute_in_block(layer: Linear, x: Tensor) -> Tensor | None:
    """Return the output of a layer if it takes part in a block, or None if the layer has to compute it."""
    calls = CURRENT.get()
    return None if calls is None else calls.compute(layer, x)
