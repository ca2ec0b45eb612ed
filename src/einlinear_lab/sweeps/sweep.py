"""The runs of a sweep file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einlinear_lab.runs.options import from_text, refuse_unknown
from einlinear_lab.runs.run import Run

_KEYS = ("config", "grid", "parts")


@dataclass(frozen=True)
class Sweep:
    """Runs, and the options that vary between them."""

    runs: tuple[Run, ...]
    axes: frozenset[str]


def read_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read the runs of a TOML or JSON file.

    `[config]` has options of all runs; `[grid]` has lists of values, whose product gives the runs; `[[parts]]` are
    tables with a config and a grid that extend or override the shared ones. A file without parts has one part.
    The overrides are options that override those of the file.

    Raises:
        ValueError: the file is damaged, has unknown entries, or describes an invalid run.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .toml or .json file, or the name of a recipe")
    content = from_text(path.read_text(encoding="utf-8"), str(path), path.suffix.removeprefix("."))
    return make_sweep(content, overrides, str(path))


def make_sweep(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, what: str = "a sweep") -> Sweep:
    """Make the runs of the content of a sweep file, see `read_sweep`.

    >>> sweep = make_sweep({"config": {"data": "digits", "steps": 10}, "grid": {"lr": [1e-3, 3e-3], "seed": [0, 1]}})
    >>> len(sweep.runs), sorted(sweep.axes)
    (4, ['lr', 'seed'])
    """
    overrides = dict(overrides or {})
    expanded = [Run.of(options | overrides) for options in _expand(content, what)]
    # Two parts may describe the same run.
    runs = tuple({run.key: run for run in expanded}.values())
    if not runs:
        raise ValueError(f"{what} describes no runs")
    parts = content.get("parts", [])
    # The file could vary these with more values.
    axes = {name for table in (content, *parts) for name in table.get("grid", {})}
    axes |= {name for part in parts for name in part.get("config", {})}
    first = dict[str, Any]()
    axes |= {
        name for run in runs for name, value in run.hyperparameters.items() if first.setdefault(name, value) != value
    }
    return Sweep(runs, frozenset(axes))


def _expand(content: Mapping[str, Any], what: str) -> Iterator[dict[str, Any]]:
    refuse_unknown(content, _KEYS, what)
    for part in content.get("parts", [{}]):
        refuse_unknown(part, _KEYS[:2], f"a part of {what}")
        config, grid = part.get("config", {}), part.get("grid", {})
        if twice := grid.keys() & config.keys():
            raise ValueError(f"a part of {what} has {' and '.join(sorted(twice))} in its config and in its grid")
        grid = {name: values for name, values in (content.get("grid", {}) | grid).items() if name not in config}
        for name, values in grid.items():
            if not isinstance(values, list):
                raise ValueError(f"{what}: the grid of {name} must be a list of values, not {values!r}")
        for combination in itertools.product(*grid.values()):
            yield content.get("config", {}) | config | dict(zip(grid, combination, strict=True))
