"""Windows of a prepared text, in batches for language models.

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
    """Windows of a prepared text: random ones to train on, those of the validation text side by side to evaluate.

    Args:
        tokens: the prepared text.
        context: tokens of a window, T.
        batch_size: windows in a batch, B.
        seed: of the training windows. The global generators are neither read nor changed.

    Raises:
        ValueError: a context or batch_size below 1, a context as long as the text or longer, a negative seed.
    """

    def __init__(self, tokens: Tokens, *, context: int, batch_size: int, seed: int) -> None:
        super().__init__(tokens.vocabulary.size, context, batch_size, seed)
        for split, text in (("training", tokens.train), ("validation", tokens.validation)):
            if len(text) <= context:
                raise ValueError(
                    f"context={context}: a window takes {context + 1} tokens, but the {split} text of {tokens.folder} "
                    f"has {len(text)}"
                )
        self.tokens = tokens

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """B windows that start anywhere in the training text, each place as likely as any other."""
        text = self.tokens.train
        generator = numpy_generator(self.seed, step)
        raw = generator.bit_generator.random_raw(self.batch_size)  # uint64, of the same bits for ever
        starts = (raw % np.uint64(len(text) - self.context)).astype(np.int64)
        return self._windows(text, starts)

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the validation text, side by side: each token is a target once, but for the first and a rest."""
        text = self.tokens.validation
        chosen = self._chosen((len(text) - 1) // self.context, count)
        return (self._windows(text, rows.numpy() * self.context) for rows in chosen)

    def _windows(self, text: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        found = text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        windows = torch.from_numpy(found)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
