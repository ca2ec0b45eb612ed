"""Batches of token sequences for language models, any of them by its number.

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

from einlinear.data.draws import draws
from einlinear.data.rows import spread
from einlinear.data.tokens import Tokens


class Sequences(ABC):
    """Where a language model's batches come from.

    Attributes:
        vocabulary: how many different tokens there are; all of them are below it.
        context: T, the tokens of a sequence.
        batch_size: B.
        seed: of the training batches.
    """

    def __init__(self, vocabulary: int, context: int, batch_size: int, seed: int) -> None:
        for name, value in (("context", context), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        draws(seed, 0)  # refuses a seed out of range
        self.vocabulary = vocabulary
        self.context = context
        self.batch_size = batch_size
        self.seed = seed

    @abstractmethod
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Training batch number `step`, the same one every time: a run goes on from any step without replaying others.

        Returns:
            Inputs and targets, both (B, T) int64. targets[:, t] follows inputs[:, : t + 1].

        Raises:
            ValueError: a negative step.
        """

    @abstractmethod
    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of held-out sequences, always the same ones in the same order.

        Args:
            count: how many sequences, spread evenly over all there are. Default, and at most: all.

        Returns:
            An iterator over inputs and targets as in `batch`; the last pair may have fewer than B rows.

        Raises:
            ValueError: `count` below 1.
        """

    def _chosen(self, available: int, count: int | None) -> Iterator[Tensor]:
        """The numbers of the held-out sequences of each evaluation batch, of so many that there are."""
        if count is not None and count < 1:
            raise ValueError(f"count={count}: evaluation needs at least 1 sequence")
        return spread(available, available if count is None else count, self.batch_size)


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
        raw = draws(self.seed, step).bit_generator.random_raw(self.batch_size)  # uint64, of the same bits for ever
        starts = (raw % np.uint64(len(text) - self.context)).astype(np.int64)
        return self._windows(text, starts)

    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the validation text, side by side: each token but the first, and a rest, is a target once."""
        text = self.tokens.validation
        chosen = self._chosen((len(text) - 1) // self.context, count)
        return (self._windows(text, rows.numpy() * self.context) for rows in chosen)

    def _windows(self, text: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        found = text[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        windows = torch.from_numpy(found)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
