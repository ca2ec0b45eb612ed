"""Slots: the pairs of a token and an expert, sorted by expert, in blocks that belong to one expert each.

The last block of an expert is filled up with empty slots. The number of blocks is only bounded from above, so that
nothing waits for the device. Blocks that are left over belong to no expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# limits of the slots of a block, which are those of the tokens of a tile
MIN_BLOCK, MAX_BLOCK = 16, 128
# full blocks of an expert of average load, so that few slots are empty
FULL_BLOCKS = 4


class Rows(NamedTuple):
    """The row of every slot in a tensor.

    Attributes:
        numbers: (slots,), int32; -1 for empty slots.
        total: the number of rows of the tensor.
        gates: (slots,), float32: factors of the rows when they are read; None for 1.
    """

    numbers: Tensor | None = None
    total: int = 0
    gates: Tensor | None = None


# of a tensor that has a row for every slot
EVERY_SLOT = Rows()


class Slots(NamedTuple):
    """The slots of all pairs.

    Attributes:
        block_size: the number of slots of a block, a power of two.
        experts: (blocks,), the expert of every block; -1 for none.
        starts: (number of experts + 1,), the first block of each expert, and the end.
        inputs: the rows of the slots' tokens, with their gates.
        tokens: the same without gates.
        pairs: the rows of the slots' pairs.
    """

    block_size: int
    experts: Tensor
    starts: Tensor
    inputs: Rows
    tokens: Rows
    pairs: Rows

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.block_size * len(self.experts)


def arrange(indices: Tensor, gates: Tensor, experts: int) -> Slots:
    """Arrange pairs in slots.

    Args:
        indices: (n, active), the experts of every token, below `experts`; on a GPU, torch itself asserts that.
        gates: (n, active).
        experts: the number of experts.
    """
    n, active = indices.shape
    pairs = n * active
    full = 1 << max(0, (pairs // (FULL_BLOCKS * experts)).bit_length() - 1)
    block_size = min(MAX_BLOCK, max(MIN_BLOCK, full))
    blocks = pairs // block_size + min(experts, pairs)
    flat = indices.flatten()
    loads = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    starts = flat.new_zeros(experts + 1)
    torch.cumsum((loads + block_size - 1) // block_size, 0, out=starts[1:])
    order = flat.argsort(stable=True)
    # from a position in the order to a slot, by expert
    shift = starts[:-1] * block_size - (loads.cumsum(0) - loads)
    slots = torch.arange(pairs, device=flat.device) + shift[flat[order]]
    pair = flat.new_full((blocks * block_size,), -1).scatter_(0, slots, order)
    expert = torch.searchsorted(starts[1:], torch.arange(blocks, device=flat.device), right=True)
    token = pair.div(active, rounding_mode="floor").int()
    scales = torch.where(pair < 0, 0, gates.flatten()[pair.clamp(min=0)].float())
    return Slots(
        block_size,
        torch.where(expert < experts, expert, -1).int(),
        starts.int(),
        Rows(token, n, scales),
        Rows(token, n),
        Rows(pair.int(), pairs),
    )
