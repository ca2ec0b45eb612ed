"""Recipes: the figures of the papers, each a TOML file in this folder, at two scales.

The scale "paper" has the config of the paper; comments name the options that cannot be reproduced. "small" asks the
same question of models that two CPU cores train in minutes to two hours. A scale has runs, see `make_sweep`, or
commands that make the figure; minutes are estimated from single steps on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from einlinear.structures.families import did_you_mean
from einlinear_lab.runs import options
from einlinear_lab.sweeps.sweep import Sweep, make_sweep

SCALES = ("small", "paper")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One scale of a recipe: the results that it shows, the command that prepares its data, and its runs."""

    about: str
    prepare: str = ""
    minutes: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Mapping[str, Any], ...] = ({},)
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Experiment of a paper: its title, the paper and section or figure, the finding, and two scales."""

    title: str
    source: str
    shows: str
    small: Scale
    paper: Scale


def names() -> tuple[str, ...]:
    files = (file.name for file in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load(name: str) -> Recipe:
    """Load a recipe. Raises ValueError for an unknown name."""
    if name not in names():
        is_path = "." in name or "/" in name
        unknown = f"{name} is neither a recipe nor a .toml or .json file" if is_path else f"unknown recipe {name!r}"
        hint = "" if is_path else did_you_mean(name, names())
        raise ValueError(f"{unknown}.{hint} The recipes are {', '.join(names())}")
    file = resources.files(__name__) / f"{name}.toml"
    content = options.from_text(file.read_text(encoding="utf-8"), file.name)
    options.refuse_unknown(content, options.names(Recipe), name)
    for scale in SCALES:
        options.refuse_unknown(content[scale], options.names(Scale), f"{scale} of {name}")
    return options.parse(Recipe, content)


def sweep(name: str, scale: str = "small", overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Return the runs of a recipe at the scale "small" or "paper", with overridden options.

    >>> sorted({run.model.width for run in sweep("lr-transfer", "paper").runs})
    [16, 64, 256, 1024, 4096]

    Raises:
        ValueError: an unknown recipe, scale or option; a recipe with commands instead of runs.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be {' or '.join(SCALES)}, not {scale!r}")
    recipe = load(name)
    chosen: Scale = getattr(recipe, scale)
    if chosen.commands:
        raise ValueError(f"{name} is no sweep; its figure is made by: {'; '.join(chosen.commands)}")
    content = {"config": chosen.config, "grid": chosen.grid, "parts": chosen.parts}
    return make_sweep(content, overrides, f"{name} ({scale})")
