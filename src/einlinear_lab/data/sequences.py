"""Batches for language models: windows of a prepared text, and images as sequences of pixels.

Shapes: B sequences in a batch, T tokens in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from einlinear_lab.data.images.dataset import Images, resize
from einlinear_lab.data.sampling import Epochs, evenly_spaced, numpy_generator
from einlinear_lab.data.text.tokens import Tokens

LEVELS = 256
# The token before the first pixel.
BOS = LEVELS


class Sequences(ABC):
    """Batches for a language model.

    Attributes:
        vocab_size: number of different tokens; all tokens are below it.
        context: tokens of a sequence, T.
        batch_size: sequences in a batch, B.
        seed: of the training batches.
    """

    def __init__(self, vocab_size: int, context: int, batch_size: int, seed: int) -> None:
        for name, value in (("context", context), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        # Refuses a seed out of range.
        numpy_generator(seed, 0)
        self.vocab_size, self.context, self.batch_size, self.seed = vocab_size, context, batch_size, seed

    @abstractmethod
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return training batch number `step`, the same one every time, so that a run resumes at any step.

        Inputs and targets are (B, T) int64; targets[:, t] follows inputs[:, : t + 1]. Raises ValueError below step 0.
        """

    @abstractmethod
    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of held-out sequences, evenly spread, always the same ones: `count` of them, or by default all.

        The last one may be smaller. Raises ValueError for a `count` below 1.
        """

    def _held_out(self, available: int, count: int | None) -> Iterator[Tensor]:
        """Yield the numbers of the held-out sequences of each evaluation batch."""
        if count is not None and count < 1:
            raise ValueError(f"count={count}: evaluation needs at least 1 sequence")
        return evenly_spaced(available, available if count is None else count, self.batch_size)


class TextSequences(Sequences):
    """Windows of a prepared text: random ones to train on, adjacent ones of the validation text to evaluate on.

    Args:
        tokens: the prepared text.
        context: tokens of a window, T.
        batch_size: windows in a batch, B.
        seed: of the training windows. The global generators are neither read nor changed.

    Raises:
        ValueError: a context or batch_size below 1, a context as long as the text or longer, a negative seed.
    """

    def __init__(self, tokens: Tokens, *, context: int, batch_size: int, seed: int) -> None:
        super().__init__(tokens.tokenizer.vocab_size, context, batch_size, seed)
        for split, text in (("training", tokens.train), ("validation", tokens.validation)):
            if len(text) <= context:
                raise ValueError(
                    f"context={context}: a window takes {context + 1} tokens, but the {split} text of {tokens.folder} "
                    f"has {len(text)}"
                )
        self.tokens = tokens

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        text = self.tokens.train
        # Raw uint64 numbers are the same in every version of NumPy.
        raw = numpy_generator(self.seed, step).bit_generator.random_raw(self.batch_size)
        return self._windows(text, (raw % np.uint64(len(text) - self.context)).astype(np.int64))

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        text = self.tokens.validation
        chosen = self._held_out((len(text) - 1) // self.context, count)
        return (self._windows(text, rows.numpy() * self.context) for rows in chosen)

    def _windows(self, text: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        # (B, T + 1)
        windows = torch.from_numpy(text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class PixelSequences(Sequences):
    """Next-pixel sequences of images: rows from the top, pixels from the left, the channels of a pixel one by one.

    In each channel, values become the tokens 0 to 255, from the darkest to the brightest value of the training images
    before they are resized: the 8 bits of photographs. The inputs are the token `BOS` and all pixels but the last, the
    targets are all pixels. Labels are not used.

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
        dark, bright = images.train_x.amin((0, 2, 3)), images.train_x.amax((0, 2, 3))
        self._train, self._test = (_quantise(x, dark, bright, size) for x in (images.train_x, images.test_x))
        super().__init__(LEVELS + 1, self._train.shape[1], batch_size, seed)
        self._epochs = Epochs(len(self._train), batch_size, seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return _shifted(self._train[self._epochs.rows(step)])

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
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
