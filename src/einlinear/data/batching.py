"""Shuffled training batches: each is a function of the seed and its number alone, so a run can go on anywhere."""

from __future__ import annotations

from torch import Tensor

from einlinear.data.augment import Augment
from einlinear.data.draws import shuffled, torch_draws
from einlinear.data.epochs import Epochs
from einlinear.data.images import Images

_AUGMENTATION, _PERMUTATION = 1, 2  # streams; 0 has the order of the images


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
    ) -> None:
        self._epochs = Epochs(len(images.train_x), batch_size, seed)
        if permutation is not None and len(permutation) != images.features:
            raise ValueError(f"a permutation of {len(permutation)} for images of {images.features} features")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.permutation = augment, permutation
        self.per_epoch = self._epochs.per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x (B, features) float32 and y, (B,) int64, or (B, classes) float32 with mixup.

        Raises:
            ValueError: a negative step.
        """
        rows = self._epochs.rows(step)
        x, y = self.images.train_x[rows], self.images.train_y[rows]
        if self.augment is not None:
            generator = torch_draws(self.seed, step, _AUGMENTATION)
            x = self.augment(x, generator)
            if self.augment.mixup:
                x, y = self.augment.mix(x, y, len(self.images.classes), generator)
        x = x.flatten(1)
        return (x if self.permutation is None else x[:, self.permutation]), y


def pixel_permutation(features: int, seed: int) -> Tensor:
    """A fixed random order of the input features, (features,) int64: it takes locality away from images."""
    return shuffled(features, seed, 0, _PERMUTATION)
