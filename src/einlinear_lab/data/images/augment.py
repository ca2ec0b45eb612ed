"""Random shifts, flips and mixup of a batch of images, by kornia."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear_lab.data.images.dataset import Images

# Folders have paths for names.
_MIRRORED = frozenset({"fashion-mnist", "cifar-10", "cifar-100"})


class Augment:
    """Random shifts and flips of a batch of images, and mixup of images and labels.

    Each image is shifted by a whole number of pixels of its own, its edge pixels repeated. The randomness
    comes from the generator that is passed in; the global one is left as it was.

    Args:
        size: (H, W) of the images.
        shift: largest shift, in pixels, in each direction.
        flip: mirror images left to right, each with probability 1/2. Only where a mirrored image keeps its
            class: not for digits.
        mixup: largest share of a second image that `mix` blends in, from 0 (none) to 1.

    Raises:
        ValueError: a negative shift, or mixup outside [0, 1].
    """

    def __init__(self, size: tuple[int, int], *, shift: int = 2, flip: bool = False, mixup: float = 0.0) -> None:
        # Takes a second, and only training needs it.
        import kornia.augmentation as K

        if shift < 0:
            raise ValueError(f"shift={shift}: it must be 0 or more pixels")
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup={mixup}: it must lie between 0 and 1")
        self.size, self.shift, self.flip, self.mixup = tuple(size), shift, flip, mixup
        self._steps: list[torch.nn.Module] = []
        if shift:
            self._steps.append(K.RandomCrop(self.size, padding=shift, padding_mode="replicate"))
        if flip:
            self._steps.append(K.RandomHorizontalFlip())
        self._mixup = K.RandomMixUpV2(lambda_val=(0.0, mixup), data_keys=["input", "class"])

    @classmethod
    def suited_to(cls, images: Images, mixup: float = 0.0) -> Augment:
        """Return shifts of 2 pixels (1 below 16 x 16), and flips for Fashion-MNIST and CIFAR.

        A user's folder is not flipped: its classes may not survive a mirror.
        """
        shift = 2 if min(images.size) >= 16 else 1
        return cls(images.size, shift=shift, flip=images.name in _MIRRORED, mixup=mixup)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Shift and flip x, (B, C, H, W) -> the same shape and dtype. x itself is not changed."""
        if x.ndim != 4 or x.shape[2:] != self.size:
            raise ValueError(f"Augment for images of size {self.size} got shape {tuple(x.shape)}")
        with _seeded(generator):
            for step in self._steps:
                x = step(x)
        return x

    def mix(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blend each image with another one of the batch, and their labels alike.

        Args:
            x: (B, C, H, W).
            y: (B,) int64 labels below `classes`.
            classes: number of classes.
            generator: source of the randomness.

        Returns:
            x of the same shape, and targets (B, classes) float32 whose rows sum to 1, which
            F.cross_entropy takes as they are.
        """
        with _seeded(generator):
            # labels (B, 3): label, label of the second image, share of the second image
            x, labels = self._mixup(x, y)
        first, second = F.one_hot(labels[:, :2].long(), classes).to(x.dtype).unbind(1)
        return x, torch.lerp(first, second, labels[:, 2:])


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Let code that draws from the global CPU generator, as kornia does, draw from `generator` instead."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield
