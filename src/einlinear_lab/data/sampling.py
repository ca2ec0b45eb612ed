"""Random numbers by seed and step, without those of the steps before, and the examples of each batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def numpy_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Return NumPy's generator for one step of one seed; a stream for each purpose. All are independent."""
    for name, value in (("seed", seed), ("step", step), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value}: it must lie between 0 and 2^64 - 1")
    # Philox is a block cipher of a counter. With seed and step as its key, no state is carried from step to step.
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def torch_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return torch's generator for one step of one seed, on the CPU."""
    return torch.Generator().manual_seed(int(numpy_generator(seed, step, stream).bit_generator.random_raw()) >> 1)


def shuffled(count: int, seed: int, step: int, stream: int = 0) -> Tensor:
    """Return the numbers below `count` in random order, (count,) int64.

    >>> shuffled(6, seed=0, step=0).tolist()
    [0, 2, 1, 5, 4, 3]
    """
    # Raw uint64 numbers are the same in every version of NumPy.
    raw = numpy_generator(seed, step, stream).bit_generator.random_raw(count)
    return torch.from_numpy(np.argsort(raw, kind="stable"))


class Epochs:
    """Passes over all training examples, each in its own order (stream 0 of the seed), without a last partial batch."""

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
        """Return the indices of the examples of batch `step`, (B,) int64. Steps count on from epoch to epoch."""
        epoch, place = divmod(step, self.per_epoch)
        # A cache: the order of an epoch does not depend on the calls before.
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.count, self.seed, epoch)
        return self._order[place * self.batch_size :][: self.batch_size]


def evenly_spaced(available: int, count: int, batch_size: int) -> Iterator[Tensor]:
    """Return the indices of `count` examples (at most all), evenly spread over the available ones, in batches.

    >>> [rows.tolist() for rows in evenly_spaced(available=10, count=4, batch_size=3)]
    [[0, 2, 5], [7]]
    """
    count = min(count, available)
    return iter((torch.arange(count) * available // count).split(batch_size))
