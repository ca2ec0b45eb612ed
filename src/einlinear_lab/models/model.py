"""What the reference models tell about themselves, so that nobody else needs to know their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from einlinear.nn.names import name_of
from einlinear_lab.models.macs import macs_per_token


class ReferenceModel(nn.Module):
    """A model of residual blocks.

    Attributes:
        ZERO: globs on the layers that start at zero: ``el.init_(model, zero=model.ZERO)``.
        LR_SCALE: glob -> learning-rate scale of its own: ``el.param_groups(model, ..., lr_scale=model.LR_SCALE)``.
        blocks: the residual blocks, in order.
    """

    ZERO: ClassVar[tuple[str, ...]]
    LR_SCALE: ClassVar[Mapping[str, float]] = {}
    blocks: nn.Sequential

    @property
    def last_block(self) -> str:
        """The qualified name of the last block, whose output is what a coordinate check measures."""
        return name_of(self, self.blocks[-1])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input, as counted by `macs_per_token`."""
        return macs_per_token(self)
