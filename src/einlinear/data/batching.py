"""Shuffled training batches, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from einlinear.data.augment import Augment
from einlinear.data.images import Images


def batches(
    images: Images,
    batch_size: int,
    *,
    epochs: int,
    seed: int,
    augment: Augment | None = None,
    permutation: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over shuffled training batches; the same seed gives the same batches.

    The last, partial batch of an epoch is dropped.

    Args:
        images: where to take the training images from.
        batch_size: images in a batch, B.
        epochs: passes over the training images.
        seed: of the shuffling and the augmentation. The global generator is neither read nor changed.
        augment: applied to each batch. Default: none.
        permutation: (features,) order of the flattened pixels, applied last. Default: row-major as they are.

    Returns:
        An iterator over x (B, features) float32 and y, (B,) int64, or (B, classes) float32 with mixup.

    Raises:
        ValueError: a batch_size below 1 or above the number of training images, or a permutation of another
            width.
    """
    count = len(images.train_x)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}: it must lie between 1 and the {count} training images")
    if permutation is not None and len(permutation) != images.features:
        raise ValueError(f"a permutation of {len(permutation)} for images of {images.features} features")
    return _batches(images, batch_size, epochs, seed, augment, permutation)


def _batches(
    images: Images,
    batch_size: int,
    epochs: int,
    seed: int,
    augment: Augment | None,
    permutation: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images.train_x), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            x, y = images.train_x[rows], images.train_y[rows]
            if augment is not None:
                x = augment(x, generator)
                if augment.mixup:
                    x, y = augment.mix(x, y, len(images.classes), generator)
            x = x.flatten(1)
            yield (x if permutation is None else x[:, permutation]), y


def pixel_permutation(features: int, seed: int) -> Tensor:
    """A fixed random order of the input features, (features,) int64: it takes locality away from images."""
    return torch.randperm(features, generator=torch.Generator().manual_seed(seed))
