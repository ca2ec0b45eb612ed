"""Tasks: what they measure."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tests.lab.data.samples import tiny
from torch import Tensor, nn

from einlinear_lab.data import Augment, Batches, Images, PixelSequences, Teacher
from einlinear_lab.training import tasks
from einlinear_lab.training.tasks import Classification, LanguageModel, Regression

CPU = torch.device("cpu")


class FirstPixels(nn.Module):
    """As many of them as there are classes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :5]


def random_images(train: int = 50, test: int = 7) -> Images:
    x = torch.randn(train + test, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(train + test) % 3
    return dataclasses.replace(
        tiny(), train_x=x[:train], train_y=y[:train], test_x=x[train:], test_y=y[train:], name="random"
    )


def test_classification_measures_all_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_AT_ONCE", 3)
    images = random_images()
    found = Classification(images, Batches(images, 5, seed=0)).evaluate(FirstPixels(), CPU)
    logits = images.test_x.flatten(1)[:, :5]
    assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, images.test_y).item())
    assert found["test_accuracy"] == pytest.approx((logits.argmax(1) == images.test_y).float().mean().item())
    wrong = images.train_x.flatten(1)[:, :5].argmax(1) != images.train_y
    assert found["train_error"] == pytest.approx(wrong.float().mean().item())


def test_training_error_is_of_augmented_images_that_are_not_mixed_up() -> None:
    images = random_images()
    augment = Augment(images.size, mixup=1.0)
    task = Classification(images, Batches(images, 5, seed=3, augment=augment), label_smoothing=0.3, train_sample=40)
    found = task.evaluate(FirstPixels(), CPU)["train_error"]
    ((x, y),) = task.batches.sample(40, 1000)
    assert found == pytest.approx((x[:, :5].argmax(1) != y).float().mean().item())
    assert found * 40 == pytest.approx(round(found * 40))
    assert task.evaluate(FirstPixels(), CPU)["train_error"] == found
    with pytest.raises(ValueError, match="train_sample=0: it must be at least 1 image"):
        Classification(images, task.batches, train_sample=0)


def test_language_model() -> None:
    data = PixelSequences(random_images(), size=2, batch_size=3, seed=0)
    model = nn.Embedding(data.vocab_size, data.vocab_size)  # logits of the next token, given this one
    found = LanguageModel(data).evaluate(model, CPU)
    x, y = (torch.cat(parts) for parts in zip(*data.evaluation(), strict=True))
    assert x.shape == (7, 8)
    expected = F.cross_entropy(model(x).movedim(-1, 1), y).item()
    assert found == pytest.approx({"validation_loss": expected, "bits_per_token": expected / math.log(2)})

    task = LanguageModel(data, validation_tokens=2 * 8 + 7)
    x, y = next(data.evaluation(2))
    expected = F.cross_entropy(model(x).movedim(-1, 1), y).item()
    assert task.evaluate(model, CPU)["validation_loss"] == pytest.approx(expected)
    assert task.loss(model, (x, y)).item() == pytest.approx(expected)
    assert LanguageModel(data, validation_tokens=1).evaluate(model, CPU)["validation_loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(task.batch(4), data.batch(4), strict=True))


def test_regression() -> None:
    teacher = Teacher(width=16)
    task = Regression(teacher, 10, seed=1)
    x, y = task.batch(3)
    assert (x.shape, y.shape) == ((10, 8), (10, 1))
    assert all(torch.equal(a, b) for a, b in zip(teacher.batch(10, seed=1, step=3), (x, y), strict=True))

    class Half(nn.Module):
        """The mean, and half of what is not."""

        def forward(self, x: Tensor) -> Tensor:
            return mean + 0.5 * (teacher(x) - mean)

    mean = teacher.evaluation()[1].mean()
    assert task.evaluate(Half(), CPU)["test_loss"] == pytest.approx(0.25, rel=1e-5)
    assert task.loss(Half(), (x, y)).item() == pytest.approx(F.mse_loss(Half()(x), y).item())
