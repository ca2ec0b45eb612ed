"""Synthetic regression: the outputs of a random network, with new data at every step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from einlinear_lab.data.sampling import numpy_generator

# Streams of random numbers.
_TRAINING, _EVALUATION, _SCALE, _WEIGHTS = range(4)
# Inputs that mean and standard deviation are measured on, and that are computed at a time.
_SAMPLE = 4096


class Teacher:
    """A random ReLU network and its data: the regression task of arXiv 2410.02117.

    Inputs are drawn from N(0, I). Each of `depth` layers is sqrt(2) relu(W x) with the entries of W from
    N(0, 1 / fan-in); a last layer gives one number, shifted and scaled to mean 0 and standard deviation 1 (measured on
    4,096 inputs).

    Args:
        features: of an input, F.
        width, depth: of the network.
        seed: of its weights.
        device: of the network and of batches.

    Raises:
        ValueError: features, width or depth below 1, a negative seed.
    """

    def __init__(
        self, features: int = 8, *, width: int = 1024, depth: int = 6, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        for name, value in (("features", features), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        self.features, self.device = features, torch.device(device)
        random = numpy_generator(seed, 0, _WEIGHTS)
        shapes = [(width, features), *(depth - 1) * [(width, width)], (1, width)]
        weights = [random.standard_normal(shape, np.float32) / math.sqrt(shape[1]) for shape in shapes]
        self._weights = [torch.from_numpy(weight).to(self.device) for weight in weights]
        y = self._raw(self._inputs(seed, 0, _SCALE, _SAMPLE))
        self._std, self._mean = torch.std_mean(y, correction=0)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, F) float32 -> (B, 1) float32."""
        parts = [self._raw(part) for part in x.split(_SAMPLE)]
        return (torch.cat(parts) - self._mean) / self._std

    def batch(self, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Return training batch number `step` of a seed, always the same one: x (B, F) and y (B, 1), float32."""
        x = self._inputs(seed, step, _TRAINING, batch_size)
        return x, self(x)

    def evaluation(self, batch_size: int = 4096) -> tuple[Tensor, Tensor]:
        """Return a batch apart from all training batches, always the same one: x (B, F) and y (B, 1)."""
        x = self._inputs(0, 0, _EVALUATION, batch_size)
        return x, self(x)

    def _inputs(self, seed: int, step: int, stream: int, batch_size: int) -> Tensor:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        x = numpy_generator(seed, step, stream).standard_normal((batch_size, self.features), np.float32)
        return torch.from_numpy(x).to(self.device)

    @torch.no_grad()
    def _raw(self, x: Tensor) -> Tensor:
        *hidden, last = self._weights
        for weight in hidden:
            x = (x @ weight.T).relu() * math.sqrt(2)
        return x @ last.T
