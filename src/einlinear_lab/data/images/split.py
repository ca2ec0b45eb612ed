"""A test set for sources without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_split(y: Tensor, classes: Sequence[str], test_fraction: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the test images, always the same ones; each class is in both."""
    train, test = [], []
    for label, name in enumerate(classes):
        members = (y == label).nonzero().flatten()
        count = len(members)
        if count < 2:
            raise ValueError(f"class {name!r} has {count} image; a training and a test set need at least 2")
        # A generator for each class: its split does not depend on which other classes there are.
        members = members[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        tests = min(max(1, round(test_fraction * count)), count - 1)
        test.append(members[:tests])
        train.append(members[tests:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
