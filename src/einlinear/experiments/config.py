"""What can be set about experiments: names, defaults, presets and limits. It imports nothing but torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

DENSE = "dense"
STRUCTURES = (DENSE, "low_rank", "kronecker", "tt(rank=4)", "monarch", "btt", "dyad")
SCHEDULES = ("cosine", "constant")

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
class Settings:
    """What all runs of a comparison share.

    Attributes:
        depth: residual blocks.
        epochs, batch_size: as usual.
        lr: learning rate of the dense model of width base_width; muP carries it over to all others.
        base_width: the width lr was found at.
        schedule: of the learning rate, "cosine" (to zero) or "constant".
        mixup: largest share of a second image, see `Augment`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        device: "cpu" or "cuda".
        threads: of the CPU. Models this small gain little from more than one, and lose a lot on a busy machine.
    """

    depth: int = 2
    epochs: int = 20
    batch_size: int = 256
    lr: float = 3e-3
    base_width: int = 64
    schedule: str = "cosine"
    mixup: float = 0.0
    label_smoothing: float = 0.0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("depth", "epochs", "batch_size", "base_width", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but this torch finds no CUDA device")
        for name in ("mixup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")


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
