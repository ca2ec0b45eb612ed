"""Random numbers by seed and step, without drawing those of the steps before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LIMIT = 2**64


def numpy_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Return NumPy's generator for one step of one seed, independent of all others.

    Args:
        seed, step, stream: from 0 to 2^64 - 1. Numbers for different purposes come from different streams.

    Raises:
        ValueError: a number out of range.
    """
    for name, value in (("seed", seed), ("step", step), ("stream", stream)):
        if not 0 <= value < _LIMIT:
            raise ValueError(f"{name}={value}: it must lie between 0 and 2^64 - 1")
    # Philox is a block cipher of a counter. With seed and step as its key, no state is carried from step to step.
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def torch_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return torch's generator for one step of one seed, on the CPU; see `numpy_generator`."""
    return torch.Generator().manual_seed(int(numpy_generator(seed, step, stream).bit_generator.random_raw()) >> 1)


def shuffled(count: int, seed: int, step: int, stream: int = 0) -> Tensor:
    """Return the numbers below `count` in random order, (count,) int64, the same in every version of NumPy and torch.

    >>> shuffled(6, seed=0, step=0).tolist()
    [0, 2, 1, 5, 4, 3]
    """
    # Raw uint64 numbers are the same in every version of NumPy.
    raw = numpy_generator(seed, step, stream).bit_generator.random_raw(count)
    return torch.from_numpy(np.argsort(raw, kind="stable"))
