"""Training tasks: data, loss and metrics. METRICS_TO_MINIMISE are the metrics where lower is better."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear_lab.data import Batches, Images, Sequences, Teacher

# Training images that the training error is measured on.
TRAIN_SAMPLE = 10_000
VALIDATION_TOKENS = 2**18
# Images of an evaluation batch.
_AT_ONCE = 1000


class Classification:
    """Image classification.

    Args:
        images: training and test images.
        batches: batches of the training images.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        train_sample: maximum number of training images that the training error is measured on; at least 1.
    """

    METRICS_TO_MINIMISE: ClassVar[tuple[str, ...]] = ("train_error", "test_loss")

    def __init__(
        self, images: Images, batches: Batches, label_smoothing: float = 0.0, train_sample: int = TRAIN_SAMPLE
    ) -> None:
        if train_sample < 1:
            raise ValueError(f"train_sample={train_sample}: it must be at least 1 image")
        self.images, self.batches = images, batches
        self.label_smoothing, self.train_sample = label_smoothing, train_sample

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batches.batch(step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy."""
        x, y = batch
        return F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return "test_loss" (mean cross-entropy) and "test_accuracy" of all test images, and "train_error".

        The latter is the error rate on a fixed sample of training images, with augmentation but without mixup.
        """
        loss, correct = 0.0, 0
        for images, y in zip(self.images.test_x.split(_AT_ONCE), self.images.test_y.split(_AT_ONCE), strict=True):
            logits, labels = model(self.batches.inputs(images).to(device)), y.to(device)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
        wrong, seen = 0, 0
        for x, y in self.batches.sample(self.train_sample, _AT_ONCE):
            wrong += int((model(x.to(device)).argmax(1) != y.to(device)).sum())
            seen += len(y)
        count = len(self.images.test_y)
        return {"test_loss": loss / count, "test_accuracy": correct / count, "train_error": wrong / seen}


class LanguageModel:
    """Next-token prediction on sequences of text or pixels.

    Args:
        sequences: training and held-out sequences.
        validation_tokens: maximum number of held-out tokens; rounded down to whole sequences, but at least one.
    """

    METRICS_TO_MINIMISE: ClassVar[tuple[str, ...]] = ("validation_loss", "bits_per_token")

    def __init__(self, sequences: Sequences, validation_tokens: int = VALIDATION_TOKENS) -> None:
        self.sequences, self.validation_tokens = sequences, validation_tokens

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.sequences.batch(step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return the mean cross-entropy on held-out sequences: "validation_loss" in nats, and "bits_per_token"."""
        loss, count = 0.0, 0
        for tokens, targets in self.sequences.evaluation(max(1, self.validation_tokens // self.sequences.context)):
            mean = self.loss(model, (tokens.to(device), targets.to(device)))
            loss += mean.item() * targets.numel()
            count += targets.numel()
        return {"validation_loss": loss / count, "bits_per_token": loss / count / math.log(2)}


class Regression:
    """Regression to a teacher on new inputs at every step.

    Args:
        teacher: the function to learn.
        batch_size: inputs per batch.
        seed: of the batches.
    """

    METRICS_TO_MINIMISE: ClassVar[tuple[str, ...]] = ("test_loss",)

    def __init__(self, teacher: Teacher, batch_size: int, *, seed: int) -> None:
        self.teacher, self.batch_size, self.seed = teacher, batch_size, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.teacher.batch(self.batch_size, self.seed, step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        return F.mse_loss(model(x), y)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return "test_loss" = 1 - R^2 on the teacher's evaluation batch: mean squared error / variance of targets."""
        x, y = (part.to(device) for part in self.teacher.evaluation())
        return {"test_loss": self.loss(model, (x, y)).item() / y.var(correction=0).item()}
