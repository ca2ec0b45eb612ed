"""One run: a residual MLP of one structure and width, trained on images from one seed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from einlinear.data import Augment, Images, batches, pixel_permutation
from einlinear.experiments.config import DENSE, Settings
from einlinear.nn import ReferenceModel, ResidualMLP, counts
from einlinear.parametrize import init_, param_groups

PERMUTATION_SEED = 0  # the order of the pixels is part of the task, the same in all runs


@dataclass(frozen=True, order=True)
class Run:
    """Which of the runs: a structure (its canonical spec), a width, a seed."""

    structure: str
    width: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What a run came to. The losses and the accuracy are None where the loss became NaN or infinite: it diverged.

    Attributes:
        structure, width, seed: which run it was.
        params: of the model, biases and norms included.
        macs: of the model, per image.
        train_loss: mean over the batches of the last epoch, augmented as they were trained on.
        test_loss, test_accuracy: of the final model, on all test images.
        step_seconds: median duration of a training step, without the data.
    """

    structure: str
    width: int
    seed: int
    params: int
    macs: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    step_seconds: float

    @property
    def run(self) -> Run:
        return Run(self.structure, self.width, self.seed)

    @property
    def diverged(self) -> bool:
        return self.train_loss is None


Progress = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


def build_model(images: Images, structure: str, width: int, depth: int) -> ReferenceModel:
    """The model of a run; all its linear layers but the head are structured."""
    return ResidualMLP(images.features, width, len(images.classes), depth, structure)


def base_model(images: Images, settings: Settings) -> ReferenceModel:
    """The model that learning rates refer to: dense, whatever the structure of the others. On the meta device."""
    with torch.device("meta"):
        return build_model(images, DENSE, settings.base_width, settings.depth)


def initialised(images: Images, run: Run, depth: int) -> ReferenceModel:
    """The model of a run as it starts."""
    torch.manual_seed(run.seed)
    model = build_model(images, run.structure, run.width, depth)
    init_(model, zero=model.ZERO)
    return model


def train(images: Images, run: Run, settings: Settings, progress: Progress | None = None) -> Result:
    """Train one model; on a CPU, the same arguments give the same losses.

    Runs of equal seed see the same batches, whatever their structure: their losses differ by less noise than those
    of different seeds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _train(images, run, settings, progress)
    finally:
        torch.set_num_threads(threads)


def _train(images: Images, run: Run, settings: Settings, progress: Progress | None) -> Result:
    device = torch.device(settings.device)
    model = initialised(images, run, settings.depth).to(device)
    base = base_model(images, settings)
    groups = param_groups(model, settings.lr, base=base, weight_decay=0.0, lr_scale=model.LR_SCALE)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    steps_per_epoch = len(images.train_x) // settings.batch_size
    steps = settings.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(settings.schedule, step / steps))
    permutation = pixel_permutation(images.features, PERMUTATION_SEED)

    losses, seconds = [], []
    stream = batches(
        images,
        settings.batch_size,
        epochs=settings.epochs,
        seed=run.seed,
        augment=Augment.suited_to(images, settings.mixup),
        permutation=permutation,
    )
    for x, y in stream:
        x, y = x.to(device), y.to(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, label_smoothing=settings.label_smoothing)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        if progress:
            progress(len(losses), steps, losses[-1])
        if not math.isfinite(losses[-1]):
            break

    test_loss, accuracy = evaluate(model, images.test_x.flatten(1)[:, permutation], images.test_y)
    finished = math.isfinite(losses[-1]) and math.isfinite(test_loss)
    return Result(
        structure=run.structure,
        width=run.width,
        seed=run.seed,
        params=counts.params(model),
        macs=model.macs,
        train_loss=statistics.fmean(losses[-steps_per_epoch:]) if finished else None,
        test_loss=test_loss if finished else None,
        test_accuracy=accuracy if finished else None,
        step_seconds=statistics.median(seconds),
    )


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int = 1000) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a model on (N, features) inputs and (N,) labels."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        labels = labels.to(device)
        logits = model(inputs.to(device))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return loss / len(x), correct / len(x)


def _decay(schedule: str, fraction: float) -> float:
    """The learning rate over its peak, when this fraction of the steps is done."""
    return 0.5 * (1 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1.0
