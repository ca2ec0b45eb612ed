"""Comparisons of structures at matched compute: the runs of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from einlinear.structures import DoesNotFit, structure
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models.config import DENSE, PAPER_1, ModelConfig, Shape
from einlinear_lab.runs.data_config import ImageDataConfig, kind_of
from einlinear_lab.runs.options import names, parse
from einlinear_lab.runs.run import Run, model_and_data
from einlinear_lab.sweeps.sweep import Sweep
from einlinear_lab.training.tasks import Classification

STRUCTURES = (DENSE, "low_rank", "kronecker", "tt(rank=4)", "monarch", "btt", "dyad")
AXES = frozenset({"structure", "width", "seed"})
# Of every run, where the loss is compared over time.
EVALUATIONS = 40
_SMALLEST_WIDTH = 16
# Where no model can be built up to this width, none can.
_LAST_WIDTH_TRIED = 1024

# Options of `einlinear compare` by name; those of the command line override them.
PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes on two cores.
    "demo": {"macs": (40_000, 80_000, 160_000), "seeds": 1, "epochs": 2},
    # The published MLP of arXiv 2406.06248, section 4, and its training as far as it carries over; hours on a GPU.
    "paper": {
        "paper": PAPER_1,
        "macs": (100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000, 6_400_000),
        "epochs": 500,
        "batch_size": 1024,
        "depth": 3,
        "mixup": 0.8,
        "label_smoothing": 0.3,
    },
}
# Defaults for an mlp on images, after arXiv 2406.06248, section 4, at a small scale.
_DEFAULTS: dict[str, Any] = {"depth": 2, "permute": True, "betas": (0.9, 0.999)}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Config of a comparison.

    Attributes:
        macs: targets of MACs per input; every structure gets its widest model within each target.
        widths: widths of every structure, instead of macs.
        sized: further models, such as those of a search, by options of structures and widths.
        dense_reach: dense also gets 2, 4, ... times the largest target, up to this multiple, so that its curve reaches
            the losses of better structures.
        epochs: passes over the training images, unless the options have `steps`.
        interleave: whether training times are compared: by default the runs are then evaluated 40 times.
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
    interleave: bool = False
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
        if varied := sorted(AXES & self.options.keys()):
            raise ValueError(f"{', '.join(varied)} cannot be set: a comparison varies {', '.join(sorted(AXES))}")


def configure(preset: str | None = None, **options: Any) -> CompareConfig:
    """Make a `CompareConfig` from its options and those of runs; the preset replaces missing ones."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    own = {*names(CompareConfig)} - {"options"}
    options = {name: value for name, value in options.items() if name not in own or value is not None}
    for name, derived in (("macs", "widths"), ("epochs", "steps")):
        if name in options and derived in options:
            raise ValueError(f"give either {name}, of which the {derived} follow, or {derived}, not both")
    options = (PRESETS[preset] if preset else {}) | options
    run_options = {name: options.pop(name) for name in list(options) if name not in own}
    return parse(CompareConfig, options | {"options": run_options})


def with_comparison_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run with the defaults of a comparison, for an mlp on images."""
    is_images = kind_of(str(options.get("data", "auto"))) is ImageDataConfig
    return {**(_DEFAULTS if is_images and options.get("model", "mlp") == "mlp" else {}), **options}


def plan(config: CompareConfig) -> Sweep:
    """Return the runs of a comparison, seed by seed, the cheapest models first; raise ValueError for an invalid one."""
    options = with_comparison_defaults(config.options)
    _, data = model_and_data(options)
    problem = data.load(seed=0)
    if "steps" not in options:
        if not isinstance(problem.task, Classification):
            raise ValueError(f"data={data.data} has no epochs: give steps")
        options["steps"] = config.epochs * problem.task.batches.per_epoch
    base = Run.of(options)
    if config.interleave and "evaluate_every" not in options:
        every = max(1, base.training.steps // EVALUATIONS)
        base = replace(base, training=replace(base.training, evaluate_every=every))

    targets = sorted(config.widths or config.macs)
    models = [model for target in targets for model in _models(base, problem.shape, config, target)]
    models += [replace(base.model, **sized) for sized in config.sized]
    if not config.widths and DENSE in config.structures:
        dense = replace(config, structures=(DENSE,))
        for exponent in range(1, config.dense_reach.bit_length()):
            models += _models(base, problem.shape, dense, targets[-1] << exponent)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = tuple(replace(base, model=model, seed=seed) for seed in seeds for model in dict.fromkeys(models))
    return Sweep(runs, AXES.union(*config.sized))


def _models(base: Run, shape: Shape, config: CompareConfig, target: int) -> Iterator[ModelConfig]:
    """Yield every structure's model, with the canonical spec, for a target: a width or a number of MACs."""
    for spec in config.structures:

        def build(width: int, spec: str = spec) -> ReferenceModel:
            return replace(base.model, structure=spec, width=width).build(shape)

        width = target if config.widths else widest(spec, build, target)
        with torch.device("meta"):
            build(width)
        canonical = structure(spec, width, base.model.expansion * width).spec
        yield replace(base.model, structure=canonical, width=width)


def widest(name: str, build: Callable[[int], ReferenceModel], budget: int) -> int:
    """Return the largest width of at most `budget` MACs, among multiples of 16, above 2048 of larger powers of two.

    MACs do not grow strictly with the width, as some widths factor better: the search ends at twice the budget.
    """
    affordable: list[int] = []
    seen: list[int] = []
    for width in _widths():
        try:
            with torch.device("meta"):
                macs = build(width).macs
        except DoesNotFit:
            if not seen and width >= _LAST_WIDTH_TRIED:
                raise
            continue
        seen.append(macs)
        if macs <= budget:
            affordable.append(width)
        elif macs > 2 * budget:
            break
    if affordable:
        return affordable[-1]
    raise ValueError(f"{name}: {budget:,} MACs are too few, the cheapest model takes {min(seen):,}")


def _widths() -> Iterator[int]:
    """Yield 16, 32, ... in steps of at most 1/32 of the width."""
    width = _SMALLEST_WIDTH
    while True:
        yield width
        width += max(_SMALLEST_WIDTH, 1 << (width // 64).bit_length() >> 1)
