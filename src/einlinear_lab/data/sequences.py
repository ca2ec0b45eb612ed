"""`Sequences`: batches for language models.

Shapes: B sequences in a batch, T tokens in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from einlinear_lab.data.rng import numpy_generator
from einlinear_lab.data.sampling import spread


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

        Returns:
            Inputs and targets, both (B, T) int64. targets[:, t] follows inputs[:, : t + 1].

        Raises:
            ValueError: a negative step.
        """

    @abstractmethod
    def evaluation(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of held-out sequences, always the same ones in the same order.

        Args:
            count: number of sequences, evenly spread over all. Default, and at most: all.

        Returns:
            An iterator over inputs and targets as in `batch`; the last pair may have fewer than B rows.

        Raises:
            ValueError: `count` below 1.
        """

    def _held_out(self, available: int, count: int | None) -> Iterator[Tensor]:
        """Yield the numbers of the held-out sequences of each evaluation batch."""
        if count is not None and count < 1:
            raise ValueError(f"count={count}: evaluation needs at least 1 sequence")
        return spread(available, available if count is None else count, self.batch_size)
