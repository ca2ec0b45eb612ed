"""Sampling: which examples form each training batch, and the fixed subset for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from einlinear_lab.data.rng import shuffled


class Epochs:
    """Passes over all training examples, each in its own order, without a last partial batch.

    Args:
        count: number of examples.
        batch_size: examples in a batch, B.
        seed: of the orders (its stream 0).

    Attributes:
        per_epoch: batches of an epoch.

    Raises:
        ValueError: a batch_size below 1 or above `count`.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        if batch_size > count:
            raise ValueError(
                f"batch_size={batch_size} is more than the {count} training examples; give batch_size={count} or less"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.per_epoch = count // batch_size
        self._epoch, self._order = 0, shuffled(count, seed, 0)

    def rows(self, step: int) -> Tensor:
        """Return the indices of the examples of batch `step`, (B,) int64. Steps count on from epoch to epoch.

        Raises:
            ValueError: a negative step.
        """
        epoch, place = divmod(step, self.per_epoch)
        # A cache: the order of an epoch does not depend on the calls before.
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.count, self.seed, epoch)
        return self._order[place * self.batch_size :][: self.batch_size]


def spread(available: int, count: int, batch_size: int) -> Iterator[Tensor]:
    """Return the indices of `count` examples (at most all), evenly spread over the available ones, in batches.

    Returns:
        An iterator over (B,) int64; the last one may be smaller.

    >>> [rows.tolist() for rows in spread(available=10, count=4, batch_size=3)]
    [[0, 2, 5], [7]]
    """
    count = min(count, available)
    return iter((torch.arange(count) * available // count).split(batch_size))
