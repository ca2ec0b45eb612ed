"""One run: a residual MLP of one structure and width, trained on images from one seed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from einlinear import training
from einlinear.data import Augment, Batches, Images, pixel_permutation
from einlinear.experiments.config import DENSE, Settings
from einlinear.nn import ReferenceModel, ResidualMLP, counts
from einlinear.parametrize import init_
from einlinear.training import Training
from einlinear.training.loop import Progress
from einlinear.training.tasks import Classification

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


def task(images: Images, run: Run, settings: Settings) -> Classification:
    """What the model of a run is trained to do. Runs of equal seed see the same batches, whatever their structure."""
    batches = Batches(
        images,
        settings.batch_size,
        seed=run.seed,
        augment=Augment.suited_to(images, settings.mixup),
        permutation=pixel_permutation(images.features, PERMUTATION_SEED),
    )
    return Classification(images, batches, settings.label_smoothing)


def train(images: Images, run: Run, settings: Settings, progress: Progress | None = None) -> Result:
    """Train one model; on a CPU, the same arguments give the same losses.

    Losses of equal seed differ by less noise than those of different seeds, since the batches are the same.
    """
    model, own = initialised(images, run, settings.depth), task(images, run, settings)
    config = Training(
        steps=settings.epochs * own.batches.per_epoch,
        lr=settings.lr,
        betas=(0.9, 0.999),
        schedule=settings.schedule,
        device=settings.device,
        threads=settings.threads,
    )
    outcome = training.train(
        model, base_model(images, settings), own, config, lr_scale=model.LR_SCALE, progress=progress
    )
    finished = not outcome.diverged
    return Result(
        structure=run.structure,
        width=run.width,
        seed=run.seed,
        params=counts.params(model),
        macs=model.macs,
        train_loss=statistics.fmean(outcome.losses[-own.batches.per_epoch :]) if finished else None,
        test_loss=outcome.measures["test_loss"] if finished else None,
        test_accuracy=outcome.measures["test_accuracy"] if finished else None,
        step_seconds=outcome.step_seconds,
    )
