"""Shuffled training batches: each is a function of the seed and its number alone, so a run can go on anywhere."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from einlinear.data.augment import Augment
from einlinear.data.images import Images


class Batches:
    """Shuffled training batches, by number; the same seed gives the same ones, in whatever order they are asked for.

    An epoch passes over all training images but those that would make a partial batch.

    Args:
        images: where to take the training images from.
        batch_size: images in a batch, B.
        seed: of the shuffling and the augmentation. The global generator is neither read nor changed.
        augment: applied to each batch. Default: none.
        permutation: (features,) order of the flattened pixels, applied last. Default: row-major as they are.

    Raises:
        ValueError: a batch_size below 1 or above the number of training images, or a permutation of another
            width.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        augment: Augment | None = None,
        permutation: Tensor | None = None,
    ) -> None:
        count = len(images.train_x)
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size={batch_size}: it must lie between 1 and the {count} training images")
        if permutation is not None and len(permutation) != images.features:
            raise ValueError(f"a permutation of {len(permutation)} for images of {images.features} features")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.permutation = augment, permutation
        self.per_epoch = count // batch_size
        self._order = lru_cache(2)(self._shuffled)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """x (B, features) float32 and y, (B,) int64, or (B, classes) float32 with mixup."""
        epoch, position = divmod(number, self.per_epoch)
        rows = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        x, y = self.images.train_x[rows], self.images.train_y[rows]
        if self.augment is not None:
            generator = seeded(self.seed, "batch", number)
            x = self.augment(x, generator)
            if self.augment.mixup:
                x, y = self.augment.mix(x, y, len(self.images.classes), generator)
        x = x.flatten(1)
        return (x if self.permutation is None else x[:, self.permutation]), y

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.images.train_x), generator=seeded(self.seed, "epoch", epoch))


def seeded(*parts: int | str) -> torch.Generator:
    """A generator of its own for every combination of numbers and words.

    >>> seeded(0, "batch", 1).initial_seed() == seeded(0, "batch", 2).initial_seed()
    False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pixel_permutation(features: int, seed: int) -> Tensor:
    """A fixed random order of the input features, (features,) int64: it takes locality away from images."""
    return torch.randperm(features, generator=torch.Generator().manual_seed(seed))
