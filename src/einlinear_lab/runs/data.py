"""What models are trained on: what can be set about each kind of data, and the task it makes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from einlinear_lab.data import (
    Augment,
    Batches,
    Images,
    PixelSequences,
    Sequences,
    Teacher,
    TextSequences,
    Tokens,
    load_images,
    load_tokens,
    pixel_permutation,
)
from einlinear_lab.data.text.tokens import DESCRIPTION
from einlinear_lab.models.config import Shape
from einlinear_lab.training.loop import Task
from einlinear_lab.training.tasks import VALIDATION_TOKENS, Classification, LanguageModel, Regression

PIXELS, TEACHER = "pixels:", "teacher"
PERMUTATION_SEED = 0  # the order of the pixels is part of the task, the same in all runs


@dataclass(frozen=True)
class TrainingProblem:
    """Data that has been loaded, and what is to be learnt of it.

    Attributes:
        task: batches, loss and metrics.
        shape: what the model has to know.
        inputs: of a step, that MACs are counted for: images, tokens or vectors.
        error: the name of the metric that stands for the quality of a final model.
        source: one sentence on where the data came from.
        digest: of the data itself.
    """

    task: Task
    shape: Shape
    inputs: int
    error: str
    source: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """What all kinds of data have in common.

    Attributes:
        data: which.
        batch_size: images, sequences or vectors of a step.
    """

    KIND: ClassVar[str]

    data: str
    batch_size: int = 256

    @abstractmethod
    def load(self, seed: int) -> TrainingProblem:
        """The problem, whose batches are those of a seed.

        Raises:
            ValueError, OSError: the data cannot be had or is damaged; a setting that it does not allow.
        """

    @abstractmethod
    def examples(self) -> int | None:
        """How many images, windows or vectors there are to train on; None if there is no end of them."""

    def skipped(self) -> tuple[str, ...]:
        """Files that were left out since they cannot be read."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """Images and their classes.

    Attributes:
        data: as for `einlinear_lab.data.load_images`.
        image_size: resize to so many pixels a side.
        limit: use only so many training images.
        permute: give the values of an image in a fixed random order, which takes locality away: for an mlp.
        augment: shift training images at random, and mirror those that keep their class.
        mixup: largest share of a second image, see `einlinear_lab.data.Augment`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        skip_broken: leave out the files of a folder that cannot be read, and say which.
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
        order = pixel_permutation(images.features, PERMUTATION_SEED) if self.permute else None
        augment = Augment.suited_to(images, self.mixup) if self.augment else None
        batches = Batches(images, self.batch_size, seed=seed, augment=augment, permutation=order, flatten=False)
        task = Classification(images, batches, self.label_smoothing)
        digest = _digest(images.train_x, images.train_y, images.test_x, images.test_y)
        shape = Shape(images.features, len(images.classes), (images.channels, *images.size))
        return TrainingProblem(task, shape, self.batch_size, "train_error", images.source, digest)

    def examples(self) -> int:
        return len(self._read().train_x)

    def skipped(self) -> tuple[str, ...]:
        return self._read().skipped

    def _read(self) -> Images:
        return _images(self.data, self.image_size, self.limit, self.skip_broken)


@dataclass(frozen=True, kw_only=True)
class SequenceData(Data):
    """Sequences of tokens.

    Attributes:
        batch_size: sequences of a step.
        validation_tokens: how many a model is evaluated on, at most; the same every time.
    """

    batch_size: int = 32
    validation_tokens: int = VALIDATION_TOKENS

    def _problem(self, sequences: Sequences, source: str, digest: str) -> TrainingProblem:
        shape = Shape(sequences.vocab_size, sequences.vocab_size, context=sequences.context)
        task = LanguageModel(sequences, self.validation_tokens)
        return TrainingProblem(task, shape, self.batch_size * sequences.context, "validation_loss", source, digest)


@dataclass(frozen=True, kw_only=True)
class TextData(SequenceData):
    """A text whose next token is predicted.

    Attributes:
        data: the folder that `einlinear prepare` wrote.
        context: tokens of a sequence.
    """

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
class PixelData(SequenceData):
    """Images whose next pixel is predicted.

    Attributes:
        data: "pixels:" and what `einlinear_lab.data.load_images` takes.
        image_size: pixels a side, after resizing.
        skip_broken: leave out the files of a folder that cannot be read, and say which.
    """

    KIND = "pixels"

    image_size: int = 8
    skip_broken: bool = False

    def load(self, seed: int) -> TrainingProblem:
        images = self._read()
        sequences = PixelSequences(images, size=self.image_size, batch_size=self.batch_size, seed=seed)
        return self._problem(sequences, images.source, _digest(images.train_x, images.test_x))

    def examples(self) -> int:
        return len(self._read().train_x)

    def skipped(self) -> tuple[str, ...]:
        return self._read().skipped

    def _read(self) -> Images:
        return _images(self.data.removeprefix(PIXELS), None, None, self.skip_broken)


@dataclass(frozen=True, kw_only=True)
class TeacherData(Data):
    """What a random network computes, see `einlinear_lab.data.Teacher`.

    Attributes:
        data: "teacher".
        features: of an input.
        teacher_width, teacher_depth: of the random network.
    """

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

    def examples(self) -> None:
        return None


KINDS: dict[str, type[Data]] = {kind.KIND: kind for kind in (ImageData, TextData, PixelData, TeacherData)}


def kind_of(data: str, kind: str | None = None, sequences: bool = False) -> type[Data]:
    """Which kind of data a name or path stands for; the kind itself may be named, as where the data is elsewhere.

    Args:
        data: the name or path.
        kind: one of `KINDS`, whatever is there.
        sequences: a model is to be trained that takes nothing else: what is not there yet should be a text.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"data_kind must be {', '.join(KINDS)}, not {kind!r}")
        return KINDS[kind]
    if data == TEACHER:
        return TeacherData
    if data.startswith(PIXELS):
        return PixelData
    return TextData if sequences or (Path(data).expanduser() / DESCRIPTION).is_file() else ImageData


@lru_cache(2)
def _images(data: str, image_size: int | None, limit: int | None, skip_broken: bool) -> Images:
    return load_images(data, image_size, limit=limit, skip_broken=skip_broken)


@lru_cache(2)
def _tokens(data: str) -> Tokens:
    return load_tokens(data)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array: Any = tensor.numpy()
        digest.update(repr(array.shape).encode())
        digest.update(array.data)
    return digest.hexdigest()
