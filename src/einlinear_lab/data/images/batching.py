"""Shuffled training batches. Each is a function of the seed and its number, so that a run resumes at any step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from einlinear_lab.data.images.augment import Augment
from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.rng import shuffled, torch_generator
from einlinear_lab.data.sampling import Epochs, spread

# Streams of random numbers; stream 0 has the order of the images.
_AUGMENTATION, _PERMUTATION, _SAMPLE = 1, 2, 3


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
        """Return x (B, features) float32, or (B, C, H, W), and y, (B,) int64, or (B, classes) float32 with mixup.

        Raises:
            ValueError: a negative step.
        """
        rows = self._epochs.rows(step)
        x, y = self.images.train_x[rows], self.images.train_y[rows]
        if self.augment is not None:
            generator = torch_generator(self.seed, step, _AUGMENTATION)
            x = self.augment(x, generator)
            if self.augment.mixup:
                x, y = self.augment.mix(x, y, len(self.images.classes), generator)
        return self.inputs(x), y

    def sample(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `count` training images (at most all), evenly spread over them, the same ones for every seed.

        They are augmented, but never mixed up.

        Returns:
            An iterator over x as in `batch` and labels (B,) int64, with B of `batch_size` but for the last pair.
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
