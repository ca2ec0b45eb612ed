"""Sweeps: which runs a file describes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einlinear_lab.runs.options import from_text, refuse_unknown
from einlinear_lab.runs.run import Run

_KEYS = ("config", "grid", "parts")


@dataclass(frozen=True)
class Sweep:
    """Runs, and the options in which they differ."""

    runs: tuple[Run, ...]
    axes: frozenset[str]


def read_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """The runs that a TOML or JSON file describes.

    The file has `[config]`, options that all runs share; `[grid]`, options with lists of values, of which all
    combinations are made; and `[[parts]]`, tables with a config and a grid of their own, on top of the others. Without
    parts the file is a single one.

    Args:
        path: of the file.
        overrides: options that override those of the file.

    Raises:
        ValueError: the file is damaged, has unknown entries, or describes a run that is wrong.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .toml or .json file, or the name of a recipe")
    content = from_text(path.read_text(encoding="utf-8"), str(path), path.suffix.removeprefix("."))
    return make_sweep(content, overrides, str(path))


def make_sweep(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, what: str = "a sweep") -> Sweep:
    """The runs that the content of a file describes, see `read_sweep`.

    >>> sweep = make_sweep({"config": {"data": "digits", "steps": 10}, "grid": {"lr": [1e-3, 3e-3], "seed": [0, 1]}})
    >>> len(sweep.runs), sorted(sweep.axes)
    (4, ['lr', 'seed'])
    """
    overrides = dict(overrides or {})
    made = [Run.of(options | overrides) for options in _expand(content, what)]
    runs = tuple({run.key: run for run in made}.values())  # a run that two parts describe is one
    if not runs:
        raise ValueError(f"{what} describes no runs")
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.identity.items():
            values.setdefault(name, set()).add(json.dumps(value))
    varied = {name for name, found in values.items() if len(found) > 1}
    return Sweep(runs, frozenset(varied | _gridded(content)))


def _expand(content: Mapping[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """The options of every run."""
    refuse_unknown(content, _KEYS, what)
    config, grid = dict(content.get("config", {})), dict(content.get("grid", {}))
    for part in content.get("parts", [{}]):
        refuse_unknown(part, _KEYS[:2], f"a part of {what}")
        own_grid = grid | part.get("grid", {})
        own = config | part.get("config", {})
        if twice := part.get("grid", {}).keys() & part.get("config", {}).keys():
            raise ValueError(f"a part of {what} has {' and '.join(sorted(twice))} in its config and in its grid")
        own_grid = {name: values for name, values in own_grid.items() if name not in part.get("config", {})}
        for name, values in own_grid.items():
            if not isinstance(values, list):
                raise ValueError(f"{what}: the grid of {name} must be a list of values, not {values!r}")
        for combination in itertools.product(*own_grid.values()):
            yield own | dict(zip(own_grid, combination, strict=True))


def _gridded(content: Mapping[str, Any]) -> set[str]:
    """Options that the file varies, or could if its lists had more values."""
    parts = content.get("parts", [])
    return {name for table in (content, *parts) for name in table.get("grid", {})} | {
        name for part in parts for name in part.get("config", {})
    }
