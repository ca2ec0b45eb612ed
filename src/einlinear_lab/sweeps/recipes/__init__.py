"""Recipes: the figures of the papers, each a TOML file in this folder, at two scales.

The scale "paper" has the settings of the paper; its comments say which of them cannot be set here. "small" asks the
same question of models that two CPU cores train in minutes, or in an hour or two. A scale is a table of its own:

    about     what of the paper can be seen at this scale
    prepare   the command that gets its data, where that is to be done first
    minutes   what it takes on two cores, estimated from the time of single steps
    config, grid, parts     the runs, see `make_sweep`
    commands  instead of runs: the commands that make the figure
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from einlinear_lab.runs import options
from einlinear_lab.sweeps.sweep import Sweep, make_sweep

SCALES = ("small", "paper")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a recipe is run at one scale: what its table in the file holds, see above."""

    about: str
    prepare: str = ""
    minutes: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Mapping[str, Any], ...] = ({},)
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Experiment of a paper at two scales: the content of a recipe.

    Attributes:
        title: what is compared.
        source: the paper, and where in it.
        shows: what the paper found.
        small, paper: the scales.
    """

    title: str
    source: str
    shows: str
    small: Scale
    paper: Scale


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    files = (file.name for file in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names():
        if "." in name or "/" in name:
            raise ValueError(
                f"{name} is neither a recipe nor a .toml or .json file. The recipes are {', '.join(names())}"
            )
        hint = options.nearest(name, names())
        raise ValueError(f"unknown recipe {name!r}: {hint}The recipes are {', '.join(names())}")
    file = resources.files(__name__) / f"{name}.toml"
    content = options.from_text(file.read_text(encoding="utf-8"), file.name)
    options.refuse_unknown(content, options.names(Recipe), name)
    for scale in SCALES:
        options.refuse_unknown(content[scale], options.names(Scale), f"{scale} of {name}")
    return options.parse(Recipe, content)


def sweep(name: str, scale: str = "small", overrides: Mapping[str, Any] | None = None) -> Sweep:
    """The runs of a recipe.

    >>> sorted({run.model.width for run in sweep("lr-transfer", "paper").runs})
    [16, 64, 256, 1024, 4096]

    Args:
        name: of the recipe.
        scale: "small" or "paper".
        overrides: options that override those of the recipe.

    Raises:
        ValueError: there is no such recipe or scale; an option that its runs do not have; the recipe has no runs, but
            commands.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be {' or '.join(SCALES)}, not {scale!r}")
    recipe = load(name)
    chosen: Scale = getattr(recipe, scale)
    if chosen.commands:
        raise ValueError(f"{name} is no sweep; its figure is made by: {'; '.join(chosen.commands)}")
    content = {"config": chosen.config, "grid": chosen.grid, "parts": chosen.parts}
    return make_sweep(content, overrides, f"{name} ({scale})")
