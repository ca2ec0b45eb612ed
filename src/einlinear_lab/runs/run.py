"""A run: one model, its data and its training. Options by name, of whatever origin, become one typed `Run`."""

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
from einlinear_lab.runs.data_config import DataConfig, TextDataConfig, kind_of
from einlinear_lab.runs.options import names, parse, refuse_unknown
from einlinear_lab.training import TrainingConfig

# Options that change results by rounding at most. Skipped files change the digest of the data. evaluate_every changes
# no result either, but errors over time need the evaluations.
_HIDDEN = ("device", "threads", "parallel", "tracker", "log_every", "checkpoint_every", "skip_broken")
# Passes over the training data, bounds of their steps, and steps on data without end.
PASSES, FEWEST, MOST, ENDLESS = 20, 200, 5000, 2000

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Config of a run: of its model, data and training, and the seed of the weights and the batches."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        training, experts = self.training, self.model.experts is not None
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if self.data.batch_size % training.accumulate:
            raise ValueError(
                f"accumulate={training.accumulate} does not divide the batch_size of {self.data.batch_size}"
            )
        if training.densify_at is not None and experts:
            raise ValueError("densify_at makes layers dense, which mixtures of experts cannot be made")
        if training.guide_until is not None and experts:
            raise ValueError("guide_until gives layers a dense guide, which mixtures of experts cannot have")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Run:
        """Make a run from its options by name; `model` and `data` determine the other options.

        >>> run = Run.of({"model": "mlp", "data": "digits", "structure": "btt", "width": "64", "steps": 100})
        >>> run.model.width, run.training.lr
        (64, 0.003)

        Raises:
            ValueError: an unknown option or a wrong value, with the allowed ones.
        """
        model, data = model_and_data(options)
        parts = {
            "model": model,
            "data": data,
            "training": _part(TrainingConfig, options),
            "seed": options.get("seed", 0),
        }
        return parse(cls, parts)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All options by name as JSON values; `Run.of` inverts it."""
        parts = [dataclasses.asdict(part) for part in (self.model, self.data, self.training)]
        kinds = {"model": self.model.NAME, "data_kind": self.data.KIND}
        flat = {**kinds, **parts[0], **parts[1], **parts[2], "seed": self.seed}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Options that can change the result; without experts, options of experts cannot."""
        hidden = (*_HIDDEN, *(OF_EXPERTS if self.model.experts is None else ()))
        return {name: value for name, value in self.config.items() if name not in hidden}

    @cached_property
    def key(self) -> str:
        """Hash of the hyperparameters, 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.hyperparameters, sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def pattern(self) -> str:
        """Pattern of the structure at this width: it changes if the user redefines a family."""
        width = self.model.width
        return str(structure(self.model.structure, width, self.model.expansion * width).pattern)

    @property
    def name(self) -> str:
        """Readable name of the run and its folder: "btt-rank-2-w64-s0-" and the key."""
        words = re.sub(r"[^a-z0-9]+", "-", self.model.structure.lower()).strip("-")[:40].strip("-")
        return f"{words}-w{self.model.width}-s{self.seed}-{self.key}"


def model_and_data(options: Mapping[str, Any]) -> tuple[ModelConfig, DataConfig]:
    """Return the model and the data of a run from its options, none of which is required; raises as `Run.of`."""
    kind, name = options.get("model", "mlp"), str(options.get("data", "auto"))
    if kind not in MODELS:
        raise ValueError(f"model must be {', '.join(MODELS)}, not {kind!r}")
    model = MODELS[kind]
    data = kind_of(name, options.get("data_kind"), sequences=model.SEQUENCES)
    allowed = [*names(model), *names(data), *names(TrainingConfig), "seed"]
    others = [option for option in options if option not in ("model", "data_kind")]
    refuse_unknown(others, allowed, f"a run of model={kind} on data={name} ({data.KIND})")
    return _part(model, options), _part(data, options)


def with_defaults(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add default `steps` and `batch_size` to the options of a run, each with a sentence that gives the reason.

    The default is 20 passes over the training data, between 200 and 5,000 steps; 2,000 steps for unlimited data. With
    fewer images than the default batch size, the batch size is a power of two, at most a quarter of the images.
    """
    completed, reasons = dict(options), list[str]()
    _, data = model_and_data(options)
    if {"steps", "batch_size"} <= options.keys():
        return completed, reasons
    examples, is_text, size = data.examples(), isinstance(data, TextDataConfig), data.batch_size
    if examples is not None and examples < size and not is_text and "batch_size" not in options:
        size = completed["batch_size"] = 1 << max(0, (examples // 4).bit_length() - 1)
        reasons.append(f"batch_size={size}, as there are {examples:,} training images")
    if "steps" not in options and examples is None:
        completed["steps"] = ENDLESS
        reasons.append(f"steps={ENDLESS}")
    elif "steps" not in options and examples is not None:
        passes = PASSES * max(1, examples // size)
        steps = completed["steps"] = min(max(passes, FEWEST), MOST)
        unit = "windows of the training text" if is_text else "training images"
        bound = "" if passes == steps else f", but at {'least' if steps == FEWEST else 'most'} {steps:,}"
        reasons.append(f"steps={steps}: {PASSES} passes over {examples:,} {unit}{bound}")
    return completed, reasons


def _part(kind: type[T], options: Mapping[str, Any]) -> T:
    return parse(kind, {name: options[name] for name in names(kind) if name in options})
