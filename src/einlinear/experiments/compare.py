"""Structures side by side: which runs a comparison consists of, and training those that are not done yet."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import einlinear
from einlinear.experiments.budget import widest
from einlinear.experiments.data import Images, batches, load_images
from einlinear.experiments.store import Experiment, Store
from einlinear.experiments.train import Progress, Result, Run, Settings, build_model, train
from einlinear.structures import structure

DENSE = "dense"
STRUCTURES = (DENSE, "low_rank", "kronecker", "tt(rank=4)", "monarch", "btt", "dyad")

# Options of `einlinear compare` by name; those given on the command line come first, then these, then the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes on two cores.
    "demo": {"macs": (40_000, 80_000, 160_000), "seeds": 1, "epochs": 2, "batch_size": 256},
    # The multilayer perceptron of arXiv 2406.06248, section 4, as far as it carries over; hours on a GPU.
    "paper": {
        "macs": (100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000, 6_400_000),
        "epochs": 500,
        "batch_size": 1024,
        "depth": 3,
        "mixup": 0.8,
        "label_smoothing": 0.3,
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare.

    Attributes:
        structures: specs, as for `einlinear.structure`.
        macs: targets: for each, every structure gets its widest model within this many MACs per image.
        widths: instead of macs: the widths every structure is trained at.
        dense_reach: dense also gets the targets 2, 4, ... times the largest one, up to this many, so that its curve
            reaches the losses that better structures have at the targets.
        seeds: how many runs of each.
        data, image_size, limit: as for `load_images`.
        settings: what the runs share.
    """

    structures: tuple[str, ...] = STRUCTURES
    macs: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000)
    widths: tuple[int, ...] = ()
    dense_reach: int = 4
    seeds: int = 3
    data: str = "auto"
    image_size: int | None = None
    limit: int | None = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if not self.structures:
            raise ValueError("name at least one structure")
        for name in ("seeds", "dense_reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("macs", "widths"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, not {', '.join(map(str, getattr(self, name)))}")


def configure(preset: str | None = None, **options: Any) -> Config:
    """A `Config` from the options of Config and Settings by name: those that are not None, then the preset's.

    Raises:
        ValueError: an unknown preset, both macs and widths, or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    given = {name: value for name, value in options.items() if value is not None}
    if "macs" in given and "widths" in given:
        raise ValueError("give either macs, of which the widths follow, or widths, not both")
    chosen = (PRESETS[preset] if preset else {}) | given
    of_settings = {f.name for f in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in chosen.items() if name in of_settings})
    return Config(settings=settings, **{name: value for name, value in chosen.items() if name not in of_settings})


@dataclass(frozen=True)
class Comparison:
    """A comparison that has been checked and is ready to run."""

    images: Images
    settings: Settings
    runs: tuple[Run, ...]
    store: Store

    def missing(self) -> list[Run]:
        """The runs that are not in the results folder yet."""
        return self.store.missing(self.runs)

    def run(self, run: Run, progress: Progress | None = None) -> Result:
        """Train one of the runs and keep its result."""
        result = train(self.images, run, self.settings, progress)
        self.store.add(result)
        return result


def prepare(config: Config, folder: str | Path, command: str = "") -> Comparison:
    """Load the data, build every model once without memory, and open the results folder. Nothing is trained.

    Args:
        config: what to compare.
        folder: for the results; one of the same settings is continued.
        command: the command line, for the record.

    Raises:
        ValueError, TypeError, FileNotFoundError: whatever is wrong with the data, a structure or the folder.
    """
    images = load_images(config.data, config.image_size, limit=config.limit)
    batches(images, config.settings.batch_size, epochs=1, seed=0)  # refuses a batch that is too large
    runs = plan(images, config)
    shared = dataclasses.asdict(config.settings) | {
        "data": images.name,
        "image_size": list(images.size),
        "channels": images.channels,
        "classes": len(images.classes),
        "training_images": len(images.train_x),
        "test_images": len(images.test_x),
    }
    structures = tuple(dict.fromkeys(run.structure for run in runs))
    experiment = Experiment(shared, images.source, structures, (command,) if command else (), _made_with())
    return Comparison(images, config.settings, runs, Store(folder, experiment))


def plan(images: Images, config: Config) -> tuple[Run, ...]:
    """The runs of a comparison: seed by seed, the cheapest models first.

    Raises:
        ValueError: a structure that is unknown, cannot be built at a width asked for or not within the MACs.
    """
    targets = sorted(config.widths or config.macs)
    chosen = [model for target in targets for model in _models(images, config, config.structures, target)]
    if not config.widths and DENSE in config.structures:
        times = 2
        while times <= config.dense_reach:
            chosen += _models(images, config, (DENSE,), times * targets[-1])
            times *= 2
    return tuple(Run(spec, width, seed) for seed in range(config.seeds) for spec, width in dict.fromkeys(chosen))


def _models(images: Images, config: Config, structures: Sequence[str], target: int) -> Iterator[tuple[str, int]]:
    """Every structure's canonical spec and width for one target, a width or a number of MACs."""
    for spec in structures:
        build = partial(build_model, images, spec, depth=config.settings.depth)
        width = target if config.widths else widest(spec, build, target)
        with torch.device("meta"):
            build(width)
        yield structure(spec, images.features, width).spec, width


def _made_with() -> str:
    versions = f"einlinear {einlinear.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.system()} {platform.machine()}"
