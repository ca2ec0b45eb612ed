"""Images as sequences of tokens, one per pixel and channel, for models that predict the next one.

Shapes: B images in a batch, T = C H W tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from einlinear_lab.data.images.dataset import Images, resize
from einlinear_lab.data.sampling import Epochs
from einlinear_lab.data.sequences import Sequences

LEVELS = 256
# The token before the first pixel.
BOS = LEVELS


class PixelSequences(Sequences):
    """Next-pixel sequences of images: rows from the top, pixels from the left, the channels of a pixel one by one.

    In each channel, values become the tokens 0 to 255, from the darkest to the brightest value of the training images
    before they are resized. For images that use the whole range of 8 bits, as photographs do, these are the 8 bits. The
    inputs are the token `BOS` and all pixels but the last, the targets are all pixels. Labels are not used.

    Args:
        images: training images to train on, test images to evaluate on.
        size: resize to size x size pixels. Default: as they are.
        batch_size: images in a batch, B.
        seed: of the order of the training images; every epoch has its own, and drops the last, partial batch.

    Raises:
        ValueError: a size below 1, a batch_size below 1 or above the number of training images, a negative seed.
    """

    def __init__(self, images: Images, *, size: int | None = 8, batch_size: int, seed: int) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size}: it must be at least 1 pixel")
        # (C,)
        dark, bright = (end(images.train_x, (0, 2, 3)) for end in (torch.amin, torch.amax))
        self._train, self._test = (_quantise(x, dark, bright, size) for x in (images.train_x, images.test_x))
        super().__init__(LEVELS + 1, self._train.shape[1], batch_size, seed)
        self._epochs = Epochs(len(self._train), batch_size, seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the training images of batch `step`, which counts on from epoch to epoch."""
        return _shifted(self._train[self._epochs.rows(step)])

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images in order."""
        return (_shifted(self._test[rows]) for rows in self._held_out(len(self._test), count))


def _quantise(x: Tensor, dark: Tensor, bright: Tensor, size: int | None) -> Tensor:
    """Quantise (N, C, H, W) floats as (N, T) uint8, channels last. A channel without contrast becomes zeros."""
    scale = torch.where(bright > dark, (LEVELS - 1) / (bright - dark), 0.0)
    # In parts, since resized floats of all images at once would be as large as the images.
    parts = [part if size is None else resize(part, size) for part in x.split(4096)]
    levels = [((part - dark[:, None, None]) * scale[:, None, None]).round().clamp(0, LEVELS - 1) for part in parts]
    return torch.cat([level.byte().movedim(1, -1).flatten(1) for level in levels])


def _shifted(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets from (B, T) uint8."""
    targets = pixels.long()
    return torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], 1), targets
