"""How many multiply-accumulates a model spends on one input, and how wide it can be for a budget of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from einlinear.nn import Linear

_SMALLEST = 16  # the narrowest model that is tried
_GIVE_UP = 1024  # where no model could be built up to this width, none will be


def model_macs(model: nn.Module) -> int:
    """Multiply-accumulates of all linear layers, structured or not, for one input vector; biases are not counted."""
    macs = 0
    for module in model.modules():
        if isinstance(module, Linear):
            macs += module.structure.macs
        elif isinstance(module, nn.Linear):
            macs += module.in_features * module.out_features
    return macs


def model_params(model: nn.Module) -> int:
    """The number of parameters, biases and norms included."""
    return sum(p.numel() for p in model.parameters())


def widest(name: str, build: Callable[[int], nn.Module], budget: int) -> int:
    """The widest model that a budget affords, among multiples of 16 (above 2048: of larger powers of two).

    Wider is not always dearer, since some widths factor better than others: the search goes on to twice the budget.

    Args:
        name: of the model, for messages.
        build: width -> model; called on the meta device, where only shapes are made.
        budget: the most multiply-accumulates for one input vector.

    Raises:
        ValueError: no width is within the budget, or none can be built.
    """
    affordable: list[int] = []
    seen: list[int] = []
    for width in _widths():
        try:
            with torch.device("meta"):
                macs = model_macs(build(width))
        except ValueError:  # this width cannot be factored as asked; another may
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
