"""Which rows of a data set a batch has: of training by the number of the batch, of evaluation always the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from einlinear.data.draws import shuffled


class Epochs:
    """Passes over all rows, each in an order of its own; those that would make a partial batch are left out.

    Args:
        count: rows there are.
        batch_size: rows of a batch, B.
        seed: of the orders, which are drawn from stream 0 of it.

    Attributes:
        per_epoch: batches of an epoch.

    Raises:
        ValueError: a batch_size below 1 or above `count`.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size={batch_size}: it must lie between 1 and the {count} training images")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.per_epoch = count // batch_size
        self._epoch, self._order = 0, shuffled(count, seed, 0)

    def rows(self, step: int) -> Tensor:
        """(B,) int64: those of batch `step`, counted on from epoch to epoch.

        Raises:
            ValueError: a negative step.
        """
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:  # kept only to save time: it is the order of the epoch, whatever was asked for before
            self._epoch, self._order = epoch, shuffled(self.count, self.seed, epoch)
        return self._order[place * self.batch_size :][: self.batch_size]


def spread(available: int, count: int, batch_size: int) -> Iterator[Tensor]:
    """So many rows of those available (at most all), evenly spread over them, in batches: (B,) int64, the last smaller.

    >>> [rows.tolist() for rows in spread(available=10, count=4, batch_size=3)]
    [[0, 2, 5], [7]]
    """
    count = min(count, available)
    return iter((torch.arange(count) * available // count).split(batch_size))
