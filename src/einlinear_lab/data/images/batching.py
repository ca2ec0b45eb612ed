"""Shuffled, augmented training batches, each a function of the seed and its number: a run resumes at any step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.sampling import Epochs, evenly_spaced, shuffled, torch_generator

# Streams of random numbers; stream 0 has the order of the images.
_AUGMENTATION, _PERMUTATION, _SAMPLE = 1, 2, 3
# Data sets whose images keep their class when mirrored. Folders have paths for names.
_MIRRORED = frozenset({"fashion-mnist", "cifar-10", "cifar-100"})


class Augment:
    """Random shifts and flips of a batch of images, and mixup of images and labels.

    Each image is shifted by a whole number of pixels of its own, its edge pixels repeated. The randomness comes from
    the generator that is passed in; the global one is left as it was.

    Args:
        size: (H, W) of the images.
        shift: largest shift, in pixels, in each direction.
        flip: mirror images left to right, each with probability 1/2. Not for digits.
        mixup: largest share of a second image that `mix` blends in, from 0 (none) to 1.

    Raises:
        ValueError: a negative shift, or mixup outside [0, 1].
    """

    def __init__(self, size: tuple[int, int], *, shift: int = 2, flip: bool = False, mixup: float = 0.0) -> None:
        if shift < 0:
            raise ValueError(f"shift={shift}: it must be 0 or more pixels")
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup={mixup}: it must lie between 0 and 1")
        self.size, self.shift, self.flip, self.mixup = tuple(size), shift, flip, mixup

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
        generator = _child(generator)
        count, channels, height, width = x.shape
        # (B, H) and (B, W), the pixels that move here
        rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
        if self.shift:
            right, down = (self._shifts(count, generator) for _ in range(2))
            rows, columns = (rows + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)
        if self.flip:
            flipped = torch.bernoulli(torch.full((count, 1), 0.5), generator=generator).bool()
            columns = torch.where(flipped, columns.flip(1), columns)
        # (B, H W)
        pixels = (rows[:, :, None] * width + columns[:, None]).flatten(1)
        return x.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(x)

    def _shifts(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw whole numbers from -shift to shift, (B, 1)."""
        return (torch.rand(count, 1, generator=generator) * (2 * self.shift + 1)).long() - self.shift

    def mix(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blend each image x (B, C, H, W) with another one of the batch, and their labels y (B,) alike.

        Returns x of the same shape, and targets (B, classes) float32 whose rows sum to 1, for F.cross_entropy.
        """
        generator = _child(generator)
        # Skips the draws of whether an image is mixed, which all are: batches stay what they have been.
        torch.rand(len(x), generator=generator)
        others = torch.randperm(len(x), generator=generator)
        # (B,), of the second image
        share = torch.rand(len(x), generator=generator) * self.mixup
        first, second = F.one_hot(torch.stack([y, y[others]]), classes).to(x.dtype)
        targets = torch.lerp(first, second, share[:, None])
        share = share[:, None, None, None]
        return x * (1 - share) + x[others] * share, targets


def _child(generator: torch.Generator) -> torch.Generator:
    """Return a generator seeded by one draw of another, whose state does not depend on what is then drawn."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


class Batches:
    """Shuffled training batches by number, the same ones for the same seed, in any order of calls.

    An epoch passes over all training images without a last partial batch.

    Args:
        images: data set of the training images.
        batch_size: images in a batch, B.
        seed: of the shuffling and the augmentation. The global generator is neither read nor changed.
        augment: applied to each batch. Default: none.
        permutation: (features,) order of the flattened pixels, applied last. Default: row-major as they are.
        flatten: False keeps the shape (C, H, W) of images, for models that take them.

    Raises:
        ValueError: a batch_size below 1 or above the number of training images, a negative seed, or a permutation of
            another width.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        augment: Augment | None = None,
        permutation: Tensor | None = None,
        flatten: bool = True,
    ) -> None:
        self._epochs = Epochs(len(images.train_x), batch_size, seed)
        if permutation is not None and len(permutation) != images.features:
            raise ValueError(f"a permutation of {len(permutation)} for images of {images.features} features")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.permutation, self.flatten = augment, permutation, flatten
        self.per_epoch = self._epochs.per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x (B, features) float32, or (B, C, H, W), and y, (B,) int64, or (B, classes) float32 with mixup."""
        rows = self._epochs.rows(step)
        x, y = self.images.train_x[rows], self.images.train_y[rows]
        if self.augment is not None:
            generator = torch_generator(self.seed, step, _AUGMENTATION)
            x = self.augment(x, generator)
            if self.augment.mixup:
                x, y = self.augment.mix(x, y, len(self.images.classes), generator)
        return self.inputs(x), y

    def sample(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `count` training images (at most all), evenly spread over them, in batches; the same for every seed.

        They are augmented, but never mixed up: x as in `batch`, and labels (B,) int64.
        """
        for number, rows in enumerate(evenly_spaced(len(self.images.train_x), count, batch_size)):
            x = self.images.train_x[rows]
            if self.augment is not None:
                x = self.augment(x, torch_generator(0, number, _SAMPLE))
            yield self.inputs(x), self.images.train_y[rows]

    def inputs(self, x: Tensor) -> Tensor:
        """Permute and flatten images (B, C, H, W) as the model needs them."""
        flat = x.flatten(1) if self.permutation is None else x.flatten(1)[:, self.permutation]
        return flat if self.flatten else flat.view_as(x)


def pixel_permutation(features: int, seed: int) -> Tensor:
    """Return a fixed random order of the input features, (features,) int64, which removes locality from images."""
    return shuffled(features, seed, 0, _PERMUTATION)
