"""Data of runs: the config of each kind of data, and the task it makes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from einlinear_lab import data as datasets
from einlinear_lab.data import Augment, Batches, Images, PixelSequences, Sequences, Teacher, TextSequences
from einlinear_lab.data.text.tokens import DESCRIPTION
from einlinear_lab.models.config import Shape
from einlinear_lab.training.loop import Task
from einlinear_lab.training.tasks import VALIDATION_TOKENS, Classification, LanguageModel, Regression

PIXELS, TEACHER = "pixels:", "teacher"
# The order of the pixels is part of the task, so it is the same in all runs.
PERMUTATION_SEED = 0
_images, _tokens = lru_cache(2)(datasets.load_images), lru_cache(2)(datasets.load_tokens)


@dataclass(frozen=True)
class TrainingProblem:
    """Data and its task, inputs per step, the metric by which models are compared, and the origin of the data."""

    task: Task
    shape: Shape
    inputs: int
    metric: str
    data_source: str
    data_digest: str


@dataclass(frozen=True, kw_only=True)
class DataConfig(ABC):
    """Config that all kinds of data share: a name or path, and the images, sequences or vectors per step."""

    KIND: ClassVar[str]

    data: str
    batch_size: int = 256

    @abstractmethod
    def load(self, seed: int) -> TrainingProblem:
        """Load the data and make the task, with batches of this seed; raise ValueError or OSError for unusable data."""

    def examples(self) -> int | None:
        """Return the number of training images or windows; None if unlimited."""
        images = self._read()
        return None if images is None else len(images.train_x)

    def skipped(self) -> tuple[str, ...]:
        """Return the files that were skipped as unreadable."""
        images = self._read()
        return () if images is None else images.skipped

    def _read(self) -> Images | None:
        """Read the images, if the data consists of images."""
        return None


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(DataConfig):
    """Config of image classification.

    Attributes:
        data: as for `einlinear_lab.data.load_images`.
        image_size: side in pixels after resizing.
        limit: maximum number of training images.
        permute: whether to permute the pixels in a fixed random order, which removes locality: for an mlp.
        augment: whether to shift training images at random, and flip those that keep their class.
        mixup: largest share of a second image, see `einlinear_lab.data.Augment`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        skip_broken: whether to skip unreadable files of a folder, and report them.
    """

    KIND = "images"

    data: str = "auto"
    image_size: int | None = None
    limit: int | None = None
    permute: bool = False
    augment: bool = True
    mixup: float = 0.0
    label_smoothing: float = 0.0
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("mixup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.mixup and not self.augment:
            raise ValueError(f"mixup={self.mixup} needs augment=true")

    def load(self, seed: int) -> TrainingProblem:
        images = self._read()
        order = datasets.pixel_permutation(images.features, PERMUTATION_SEED) if self.permute else None
        augment = Augment.suited_to(images, self.mixup) if self.augment else None
        batches = Batches(images, self.batch_size, seed=seed, augment=augment, permutation=order, flatten=False)
        task = Classification(images, batches, self.label_smoothing)
        digest = _digest(images.train_x, images.train_y, images.test_x, images.test_y)
        shape = Shape(images.features, len(images.classes), (images.channels, *images.size))
        return TrainingProblem(task, shape, self.batch_size, "train_error", images.source, digest)

    def _read(self) -> Images:
        return _images(self.data, self.image_size, limit=self.limit, skip_broken=self.skip_broken)


@dataclass(frozen=True, kw_only=True)
class SequenceDataConfig(DataConfig):
    """Config of next-token prediction, evaluated on at most `validation_tokens`, always the same ones."""

    batch_size: int = 32
    validation_tokens: int = VALIDATION_TOKENS

    def _problem(self, sequences: Sequences, source: str, digest: str) -> TrainingProblem:
        shape = Shape(sequences.vocab_size, sequences.vocab_size, context=sequences.context)
        task = LanguageModel(sequences, self.validation_tokens)
        return TrainingProblem(task, shape, self.batch_size * sequences.context, "validation_loss", source, digest)


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(SequenceDataConfig):
    """Config of sequences of `context` tokens; the data is a folder that `einlinear prepare` wrote."""

    KIND = "text"

    context: int = 128

    def load(self, seed: int) -> TrainingProblem:
        tokens = _tokens(self.data)
        sequences = TextSequences(tokens, context=self.context, batch_size=self.batch_size, seed=seed)
        source = "; ".join(f"{part.name}: {part.origin}" for part in tokens.counts)
        return self._problem(sequences, source, tokens.sha256)

    def examples(self) -> int:
        return max(1, len(_tokens(self.data).train) // self.context)


@dataclass(frozen=True, kw_only=True)
class PixelDataConfig(SequenceDataConfig):
    """Config of next-pixel prediction on images; the data is "pixels:" and a name or path as for `ImageDataConfig`."""

    KIND = "pixels"

    image_size: int = 8
    skip_broken: bool = False

    def load(self, seed: int) -> TrainingProblem:
        images = self._read()
        sequences = PixelSequences(images, size=self.image_size, batch_size=self.batch_size, seed=seed)
        return self._problem(sequences, images.source, _digest(images.train_x, images.test_x))

    def _read(self) -> Images:
        return _images(self.data.removeprefix(PIXELS), skip_broken=self.skip_broken)


@dataclass(frozen=True, kw_only=True)
class TeacherDataConfig(DataConfig):
    """Config of regression to a random network, see `einlinear_lab.data.Teacher`; the data is "teacher"."""

    KIND = "teacher"

    data: str = TEACHER
    batch_size: int = 1024
    features: int = 8
    teacher_width: int = 1024
    teacher_depth: int = 6

    def load(self, seed: int) -> TrainingProblem:
        teacher = Teacher(self.features, width=self.teacher_width, depth=self.teacher_depth)
        task = Regression(teacher, self.batch_size, seed=seed)
        source = f"a random network of {self.teacher_depth} layers of width {self.teacher_width}"
        digest = _digest(*teacher.evaluation())
        return TrainingProblem(task, Shape(self.features, 1), self.batch_size, "test_loss", source, digest)


KINDS: dict[str, type[DataConfig]] = {
    kind.KIND: kind for kind in (ImageDataConfig, TextDataConfig, PixelDataConfig, TeacherDataConfig)
}


def kind_of(data: str, kind: str | None = None, sequences: bool = False) -> type[DataConfig]:
    """Return the kind of data of a name or path, unless a key of `KINDS` is given; models of sequences take texts."""
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"data_kind must be {', '.join(KINDS)}, not {kind!r}")
        return KINDS[kind]
    if data == TEACHER:
        return TeacherDataConfig
    if data.startswith(PIXELS):
        return PixelDataConfig
    return TextDataConfig if sequences or (Path(data).expanduser() / DESCRIPTION).is_file() else ImageDataConfig


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array: Any = tensor.numpy()
        digest.update(repr(array.shape).encode())
        digest.update(array.data)
    return digest.hexdigest()
