"""Shuffled, augmented training batches, each a function of the seed and its number: a run resumes at any step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.sampling import Epochs, shuffled, spread, torch_generator

# Streams of random numbers; stream 0 has the order of the images.
_AUGMENTATION, _PERMUTATION, _SAMPLE = 1, 2, 3
# Data sets whose images keep their class when mirrored. Folders have paths for names.
_MIRRORED = frozenset({"fashion-mnist", "cifar-10", "cifar-100"})


class Augment:
    """Random shifts and flips of a batch of images, and mixup of images and labels, by kornia.

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
        """Blend each image x (B, C, H, W) with another one of the batch, and their labels y (B,) alike.

        Returns x of the same shape, and targets (B, classes) float32 whose rows sum to 1, for F.cross_entropy.
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
        for number, rows in enumerate(spread(len(self.images.train_x), count, batch_size)):
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
