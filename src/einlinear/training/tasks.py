"""What models are trained to do: data, a loss and measures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.data import Batches, Images


class Classification:
    """Images to classes.

    Args:
        images: what to learn, and the test images that measure it.
        batches: of the training images.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """

    def __init__(self, images: Images, batches: Batches, label_smoothing: float = 0.0) -> None:
        self.images, self.batches, self.label_smoothing = images, batches, label_smoothing
        test_x = images.test_x.flatten(1)
        self._test_x = test_x if batches.permutation is None else test_x[:, batches.permutation]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batches.batch(step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross-entropy."""
        x, y = batch
        return F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, device: torch.device, batch_size: int = 1000) -> dict[str, float]:
        """Mean cross-entropy and accuracy on all test images."""
        loss, correct = 0.0, 0
        batches = zip(self._test_x.split(batch_size), self.images.test_y.split(batch_size), strict=True)
        for inputs, labels in batches:
            labels = labels.to(device)
            logits = model(inputs.to(device))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
        return {"test_loss": loss / len(self._test_x), "test_accuracy": correct / len(self._test_x)}
