"""Structures side by side at matched compute: which runs a comparison consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from einlinear.structures import structure
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models.config import DENSE, ModelConfig, Shape
from einlinear_lab.runs.data import ImageData, kind_of
from einlinear_lab.runs.options import parse
from einlinear_lab.runs.run import Run, model_and_data
from einlinear_lab.sweeps.budget import widest
from einlinear_lab.sweeps.sweep import Sweep
from einlinear_lab.training.tasks import Classification

STRUCTURES = (DENSE, "low_rank", "kronecker", "tt(rank=4)", "monarch", "btt", "dyad")
AXES = frozenset({"structure", "width", "seed"})

# Options of `einlinear compare` by name; those given on the command line come first, then these, then the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes on two cores.
    "demo": {"macs": (40_000, 80_000, 160_000), "seeds": 1, "epochs": 2},
    # The MLP of arXiv 2406.06248, section 4, as far as it carries over; hours on a GPU.
    "paper": {
        "macs": (100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000, 6_400_000),
        "epochs": 500,
        "batch_size": 1024,
        "depth": 3,
        "mixup": 0.8,
        "label_smoothing": 0.3,
    },
}
# What it sets differently from a single run for an mlp on images: that of arXiv 2406.06248, section 4, in small.
_DEFAULTS: dict[str, Any] = {"depth": 2, "permute": True, "betas": (0.9, 0.999)}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    Attributes:
        structures: specs, as for `einlinear.structure`.
        macs: targets: for each, every structure gets its widest model within this many MACs per input.
        widths: instead of macs: the widths every structure is trained at.
        sized: models whose sizes are given, such as those that a search has found: their structures and widths, by
            option.
        dense_reach: dense also gets the targets 2, 4, ... times the largest one, up to this many, so that its curve
            reaches the losses that better structures have at the targets.
        seeds: how many runs of each.
        first_seed: of these.
        epochs: passes over the training images, unless the options have `steps`.
        options: of all runs, see `Run.of`.
    """

    structures: tuple[str, ...] = STRUCTURES
    macs: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000)
    widths: tuple[int, ...] = ()
    sized: tuple[Mapping[str, Any], ...] = ()
    dense_reach: int = 4
    seeds: int = 3
    first_seed: int = 0
    epochs: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.structures and not self.sized:
            raise ValueError("name at least one structure")
        for name in ("seeds", "dense_reach", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("macs", "widths"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, not {', '.join(map(str, getattr(self, name)))}")
        taken = sorted(AXES & self.options.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set: a comparison varies {', '.join(sorted(AXES))}")


def configure(preset: str | None = None, **options: Any) -> CompareConfig:
    """Make a `CompareConfig` from its options and those of runs; what is not given, or None, is the preset's.

    Raises:
        ValueError: an unknown preset; both macs and widths, or epochs and steps; a value of the wrong type or out of
            range.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    own = CompareConfig.__dataclass_fields__.keys() - {"options"}
    given = {name: value for name, value in options.items() if not (name in own and value is None)}
    if "macs" in given and "widths" in given:
        raise ValueError("give either macs, of which the widths follow, or widths, not both")
    if "epochs" in given and "steps" in given:
        raise ValueError("give either epochs, of which the steps follow, or steps, not both")
    chosen = (PRESETS[preset] if preset else {}) | given
    of_runs = {name: value for name, value in chosen.items() if name not in own}
    return parse(CompareConfig, {name: value for name, value in chosen.items() if name in own} | {"options": of_runs})


def template(options: Mapping[str, Any]) -> Run:
    """A run with the defaults of a comparison, on top of which come the options."""
    return Run.of(_with_defaults(options))


def _with_defaults(options: Mapping[str, Any]) -> Mapping[str, Any]:
    images = kind_of(str(options.get("data", "auto"))) is ImageData
    return {**_DEFAULTS, **options} if images and options.get("model", "mlp") == "mlp" else options


def plan(config: CompareConfig) -> Sweep:
    """The runs of a comparison: seed by seed, the cheapest models first. Nothing is trained.

    Raises:
        ValueError, OSError: what is wrong with the data or an option; a structure that is unknown, cannot be built at a
            width asked for or not within the MACs.
    """
    _, data = model_and_data(_with_defaults(config.options))
    problem = data.load(seed=0)
    steps = config.options.get("steps")
    if steps is None:
        if not isinstance(problem.task, Classification):
            raise ValueError(f"data={data.data} has no epochs: give steps")
        steps = config.epochs * problem.task.batches.per_epoch
    base = template({**config.options, "steps": steps})

    targets = sorted(config.widths or config.macs)
    models = [model for target in targets for model in _models(base, problem.shape, config, target)]
    models += [replace(base.model, **sized) for sized in config.sized]
    if not config.widths and DENSE in config.structures:
        dense, times = replace(config, structures=(DENSE,)), 2
        while times <= config.dense_reach:
            models += _models(base, problem.shape, dense, times * targets[-1])
            times *= 2
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = tuple(replace(base, model=model, seed=seed) for seed in seeds for model in dict.fromkeys(models))
    return Sweep(runs, AXES.union(*config.sized))


def _models(base: Run, shape: Shape, config: CompareConfig, target: int) -> Iterator[ModelConfig]:
    """Every structure's model for one target, a width or a number of MACs, its structure written canonically."""
    for spec in config.structures:

        def build(width: int, spec: str = spec) -> ReferenceModel:
            return replace(base.model, structure=spec, width=width).build(shape)

        width = target if config.widths else widest(spec, build, target)
        with torch.device("meta"):
            build(width)
        canonical = structure(spec, width, base.model.expansion * width).spec
        yield replace(base.model, structure=canonical, width=width)
