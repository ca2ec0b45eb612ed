"""Where the pairs of a token and an expert stand: sorted by expert, in blocks that hold pairs of one expert alone.

What does not fill its last block leaves slots empty. How many blocks there are is only bounded from above, so that
nothing waits for the device: those that are left over belong to no expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST, LARGEST = 16, 128  # slots of a block: the shortest side of a tile, the longest
FILLED = 4  # blocks that an expert of average load fills, if they are not the smallest, so that few slots are empty


class Rows(NamedTuple):
    """Which row of a tensor every slot has.

    Attributes:
        numbers: (slots,), int32; -1 for none.
        total: how many rows the tensor has.
        gates: (slots,), float32: what the rows are multiplied by as they are read; None for one.
    """

    numbers: Tensor
    total: int
    gates: Tensor | None = None


class Slots(NamedTuple):
    """Pairs in blocks.

    Attributes:
        unit: the slots of a block, a power of two.
        experts: (blocks,), of every block; -1 for none.
        starts: (number of experts + 1,), the first block of each, and after the last.
        inputs: the rows of a slot's token, gated.
        tokens: the same, without gates.
        pairs: the rows of its pair.
    """

    unit: int
    experts: Tensor
    starts: Tensor
    inputs: Rows
    tokens: Rows
    pairs: Rows

    @property
    def size(self) -> int:
        return self.unit * len(self.experts)


def arrange(indices: Tensor, gates: Tensor, experts: int) -> Slots:
    """The slots of (n, active) pairs; indices from 0 to experts - 1, as on a GPU torch itself asserts."""
    n, active = indices.shape
    pairs = n * active
    unit = min(LARGEST, max(SMALLEST, 1 << max(0, (pairs // (FILLED * experts)).bit_length() - 1)))
    blocks = pairs // unit + min(experts, pairs)
    flat = indices.flatten()
    loads = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    starts = flat.new_zeros(experts + 1)
    torch.cumsum((loads + unit - 1) // unit, 0, out=starts[1:])
    order = flat.argsort(stable=True)
    first = starts[:-1] * unit - (loads.cumsum(0) - loads)  # from a place in the order to a slot, by expert
    slots = torch.arange(pairs, device=flat.device) + first[flat[order]]
    pair = flat.new_full((blocks * unit,), -1).scatter_(0, slots, order)
    number = torch.arange(blocks, device=flat.device)
    of_block = torch.searchsorted(starts[1:], number, right=True)
    token = pair.div(active, rounding_mode="floor")
    scales = torch.where(pair < 0, 0, gates.flatten()[pair.clamp(min=0)].float())
    tokens = token.int()
    return Slots(
        unit,
        torch.where(of_block < experts, of_block, -1).int(),
        starts.int(),
        Rows(tokens, n, scales),
        Rows(tokens, n),
        Rows(pair.int(), pairs),
    )
