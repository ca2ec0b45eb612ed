"""Batches of windows of a prepared text, for language models.

Shapes: B windows in a batch, T tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from einlinear_lab.data.rng import numpy_generator
from einlinear_lab.data.sequences import Sequences
from einlinear_lab.data.text.tokens import Tokens


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
        """Return B windows of the training text, which start at uniformly random tokens."""
        text = self.tokens.train
        # Raw uint64 numbers are the same in every version of NumPy.
        raw = numpy_generator(self.seed, step).bit_generator.random_raw(self.batch_size)
        starts = (raw % np.uint64(len(text) - self.context)).astype(np.int64)
        return self._windows(text, starts)

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield adjacent windows of the validation text: each token but the first and the last few is a target once."""
        text = self.tokens.validation
        chosen = self._held_out((len(text) - 1) // self.context, count)
        return (self._windows(text, rows.numpy() * self.context) for rows in chosen)

    def _windows(self, text: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        # (B, T + 1)
        windows = torch.from_numpy(text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
