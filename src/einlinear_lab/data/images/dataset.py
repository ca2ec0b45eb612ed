"""`Images`: what every source of images returns, in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """A classification data set: training and test images with their labels.

    Attributes:
        name: "fashion-mnist", "digits", "cifar-10", "cifar-100" or the folder's resolved path.
        source: one sentence on where the images came from.
        train_x, test_x: (N, C, H, W) float32, standardised with the training set's mean and standard
            deviation per channel.
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


def check_finite(images: Images, files: Sequence[Path] = ()) -> None:
    """Raise ValueError if any pixel is NaN or infinite.

    Args:
        images: to be checked.
        files: the images' files, those of the training images first; the error then names the first bad one.
    """
    starts = {"training": 0, "test": len(images.train_x)}
    for (split, start), x in zip(starts.items(), (images.train_x, images.test_x), strict=True):
        bad = ~x.isfinite().flatten(1)  # (N, C H W)
        if bad.any():
            rows = bad.any(1).nonzero().flatten()
            first = f", first in {files[start + int(rows[0])]}" if files else ""
            raise ValueError(
                f"{images.name}: {int(bad.sum())} pixels of {len(rows)} {split} images are NaN or infinite"
                f"{first}; all pixels must be finite"
            )


def resize(x: Tensor, size: int) -> Tensor:
    """Resize (N, C, H, W) to (N, C, size, size), bilinear and antialiased."""
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
