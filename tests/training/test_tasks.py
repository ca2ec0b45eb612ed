"""Tasks: what they measure."""

import dataclasses

import pytest
import torch
from tests.data.samples import tiny
from torch import Tensor, nn

from einlinear.data import Batches
from einlinear.training.tasks import Classification


def test_measures_are_means_over_all_test_images() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :5]

    images = tiny()
    x = torch.randn(7, *images.train_x.shape[1:], generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = dataclasses.replace(images, test_x=x, test_y=y)
    found = Classification(images, Batches(images, 5, seed=0)).evaluate(Table(), torch.device("cpu"), batch_size=3)
    logits = x.flatten(1)[:, :5]
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item())
    assert found["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
