"""Hyperparameters that were tuned at one batch size and duration, for another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters of Adam that depend on the batch size and the duration of a training.

    Attributes:
        lr, weight_decay, eps: as for `param_groups`, the decay "independent".
        betas: of the running means of gradients and of their squares.

    Example:
        >>> import einlinear as el
        >>> tuned = el.mup.Hyperparameters(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
        >>> tuned.scaled(batch=4, duration=16)
        Hyperparameters(lr=0.001, weight_decay=0.05, betas=(0.975, 0.9875), eps=5e-09)
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def scaled(self, *, batch: float = 1.0, duration: float = 1.0) -> Hyperparameters:
        """Return the hyperparameters for `batch` times the samples in a batch and `duration` times those in total.

        Steps of Adam follow a stochastic differential equation, whose time and noise stay the same (Malladi et al.,
        arXiv 2205.10287; with decay and duration: arXiv 2512.22382). With s = batch / duration, which divides the
        number of steps, lr and weight_decay are multiplied by sqrt(s), 1 - betas by s, so that means span the same part
        of the training, and eps by 1 / sqrt(batch), as the noise of gradients.

        Raises:
            ValueError: a factor that is not positive, or so large a batch that a running mean has no memory.
        """
        for name, value in (("batch", batch), ("duration", duration)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value}")
        s = batch / duration
        first, second = (1 - s * (1 - beta) for beta in self.betas)
        if min(first, second) < 0:
            most = 1 / (1 - min(self.betas))
            raise ValueError(
                f"batch / duration = {s:g} leaves running means no memory: betas {self.betas} allow at most {most:g}"
            )
        root = math.sqrt(s)
        betas, eps = (first, second), self.eps / math.sqrt(batch)
        return replace(self, lr=self.lr * root, weight_decay=self.weight_decay * root, betas=betas, eps=eps)
