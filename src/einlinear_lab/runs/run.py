"""A run: one model, its data and its training. It is written down as flat options, and known by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from einlinear.structures import structure
from einlinear_lab.models import MODELS, ModelConfig
from einlinear_lab.models.config import OF_EXPERTS
from einlinear_lab.runs.data import Data, kind_of
from einlinear_lab.runs.options import names, parse, refuse_unknown
from einlinear_lab.training import Training

# They change no result, but for how floating-point sums are rounded. Nor does evaluate_every, but a run that was never
# evaluated is not the one that is asked for where its errors over time are wanted. Which files were left out is
# told by the digest of the data.
_HIDDEN = ("device", "threads", "parallel", "tracker", "log_every", "checkpoint_every", "skip_broken")


T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        model: its kind and sizes.
        data: what it is trained on.
        training: how.
        seed: of the weights and the batches.
    """

    model: ModelConfig
    data: Data
    training: Training
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data.batch_size % self.training.accumulate:
            raise ValueError(
                f"accumulate={self.training.accumulate} does not divide the batch_size of {self.data.batch_size}"
            )
        if self.training.densify_at is not None and self.model.experts is not None:
            raise ValueError("densify_at makes layers dense, which mixtures of experts cannot be made")
        if self.training.guide_until is not None and self.model.experts is not None:
            raise ValueError("guide_until gives layers a dense guide, which mixtures of experts cannot have")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Run:
        """A run from options by name, all in one: `model` and `data` say which others there are.

        >>> run = Run.of({"model": "mlp", "data": "digits", "structure": "btt", "width": "64", "steps": 100})
        >>> run.model.width, run.training.lr
        (64, 0.003)

        Raises:
            ValueError: an unknown option, or a value that is wrong, with what would be right.
        """
        model, data = model_and_data(options)
        return cls(model, data, _part(Training, options), _part(_Seed, options).seed)

    @cached_property
    def options(self) -> dict[str, Any]:
        """All options by name, as JSON values: `Run.of` gives the run back."""
        parts = [dataclasses.asdict(part) for part in (self.model, self.data, self.training)]
        kinds = {"model": self.model.NAME, "data_kind": self.data.KIND}
        flat = {**kinds, **parts[0], **parts[1], **parts[2], "seed": self.seed}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The options that can change what comes out: all but the device, how often it is noted down and the like, and
        those about experts where there are none."""
        idle = (*_HIDDEN, *(OF_EXPERTS if self.model.experts is None else ()))
        return {name: value for name, value in self.options.items() if name not in idle}

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits, which are the same for runs of the same identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def pattern(self) -> str:
        """What the structure's name stands for at this width: a family of the user's may have changed."""
        width = self.model.width
        return str(structure(self.model.structure, width, self.model.expansion * width).pattern)

    @property
    def name(self) -> str:
        """The name for people and folders: "btt-rank-2-w64-s0-" and the key."""
        words = re.sub(r"[^a-z0-9]+", "-", self.model.structure.lower()).strip("-")[:40].strip("-")
        return f"{words}-w{self.model.width}-s{self.seed}-{self.key}"


def model_and_data(options: Mapping[str, Any]) -> tuple[ModelConfig, Data]:
    """Return the model and the data of a run from its options, of which none has to be given.

    Raises:
        ValueError: an unknown option, or a wrong value of an option of the model or the data.
    """
    kind, name = options.get("model", "mlp"), str(options.get("data", "auto"))
    if kind not in MODELS:
        raise ValueError(f"model must be {', '.join(MODELS)}, not {kind!r}")
    model = MODELS[kind]
    data = kind_of(name, options.get("data_kind"), sequences=model.SEQUENCES)
    known = [*names(model), *names(data), *names(Training), "seed"]
    given = [option for option in options if option not in ("model", "data_kind")]
    refuse_unknown(given, known, f"a run of model={kind} on data={name} ({data.KIND})")
    return _part(model, options), _part(data, options)


def _part(kind: type[T], options: Mapping[str, Any]) -> T:
    return parse(kind, {name: options[name] for name in names(kind) if name in options})


@dataclass(frozen=True)
class _Seed:
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
