"""Structures side by side: which runs a comparison consists of, and training those that are not done yet."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import einlinear
from einlinear.data import Batches, Images, load_images
from einlinear.experiments.budget import widest
from einlinear.experiments.config import DENSE, Config, Settings
from einlinear.experiments.store import Experiment, Store
from einlinear.experiments.train import Result, Run, build_model, train
from einlinear.structures import structure
from einlinear.training.loop import Progress


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
    Batches(images, config.settings.batch_size, seed=0)  # refuses a batch that is too large
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
