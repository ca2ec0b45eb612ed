"""`Sequences`: what every source of batches for language models gives.

Shapes: B sequences in a batch, T tokens in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from einlinear_lab.data.rng import numpy_generator
from einlinear_lab.data.sampling import spread


class Sequences(ABC):
    """Where a language model's batches come from.

    Attributes:
        vocab_size: how many different tokens there are; all of them are below it.
        context: T, the tokens of a sequence.
        batch_size: B.
        seed: of the training batches.
    """

    def __init__(self, vocab_size: int, context: int, batch_size: int, seed: int) -> None:
        for name, value in (("context", context), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        numpy_generator(seed, 0)  # refuses a seed out of range
        self.vocab_size = vocab_size
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
        """Which of the held-out sequences that are available each evaluation batch has, by their numbers."""
        if count is not None and count < 1:
            raise ValueError(f"count={count}: evaluation needs at least 1 sequence")
        return spread(available, available if count is None else count, self.batch_size)
