"""`Images`: what every source of images returns, in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """A classification data set: training and test images with their labels.

    Attributes:
        name: "fashion-mnist", "digits", "cifar-10", "cifar-100" or the folder's resolved path.
        source: one sentence on where the images came from.
        train_x, test_x: (N, C, H, W) float32, standardised with the training set's mean and standard deviation per
            channel.
        train_y, test_y: (N,) int64, indices into classes.
        classes: the names of the classes.
        skipped: the files of a user's folder that were left out since they cannot be read, relative to it.
    """

    name: str
    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Number of channels C: 1 for grey images, 3 for colour."""
        return self.train_x.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train_x.shape[2], self.train_x.shape[3]

    @property
    def features(self) -> int:
        """Number of features of a flattened image, C H W."""
        return math.prod(self.train_x.shape[1:])


def resize(x: Tensor, size: int) -> Tensor:
    """Resize (N, C, H, W) to (N, C, size, size), bilinear and antialiased."""
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


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
