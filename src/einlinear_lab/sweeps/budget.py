"""How wide a model can be for a budget of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from einlinear.structures import DoesNotFit
from einlinear_lab.models import ReferenceModel

_SMALLEST = 16  # the narrowest model that is tried
_GIVE_UP = 1024  # where no model could be built up to this width, none will be


def widest(name: str, build: Callable[[int], ReferenceModel], budget: int) -> int:
    """The widest model that a budget affords, among multiples of 16 (above 2048: of larger powers of two).

    Wider is not always dearer, since some widths factor better than others: the search goes on to twice the budget.

    Args:
        name: of the model, for messages.
        build: width -> model; called on the meta device, where only shapes are made.
        budget: the most multiply-accumulates for one input.

    Raises:
        ValueError: no width is within the budget, or none can be built.
    """
    affordable: list[int] = []
    seen: list[int] = []
    for width in _widths():
        try:
            with torch.device("meta"):
                macs = build(width).macs
        except DoesNotFit:  # another width may
            if not seen and width >= _GIVE_UP:
                raise
            continue
        seen.append(macs)
        if macs <= budget:
            affordable.append(width)
        elif macs > 2 * budget:
            break
    if affordable:
        return affordable[-1]
    raise ValueError(f"{name}: {budget:,} MACs are too few, the cheapest model takes {min(seen):,}")


def _widths() -> Iterator[int]:
    """16, 32, ... in steps of at most 1/32 of the width, so that a search stays short."""
    width = _SMALLEST
    while True:
        yield width
        width += max(_SMALLEST, 1 << (width // 64).bit_length() >> 1)
