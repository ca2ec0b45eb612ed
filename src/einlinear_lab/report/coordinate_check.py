"""Coordinate check: how much one training step changes the features at every width, on disk and as a figure.

FOLDER/coord-check.json   {"format": 1, "command": ..., "source": ..., "updates": [
                              {"structure": ..., "structure_aware": ..., "by_width": {"64": 0.1, "256": null}}, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from markupsafe import Markup, escape

from einlinear.files import read_json, write_json
from einlinear_lab.report.charts import Chart, colour, log_axis, size_axis, symbol, trace
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable

FILE = "coord-check.json"
_FORMAT = 1


@dataclass(frozen=True)
class FeatureUpdates:
    """The relative change of the features after the last block in one step."""

    structure: str
    # whether every factor had its own learning rate; the naive control has that of a dense layer
    structure_aware: bool
    # root mean square of the change over that of the features, mean over the steps; NaN or infinite for divergence
    by_width: dict[int, float]

    @property
    def name(self) -> str:
        return self.structure if self.structure_aware else f"{self.structure}, naive"

    @property
    def max_over_min(self) -> float | None:
        """The largest update over the smallest: near 1 where learning rates transfer, None where a run diverged."""
        values = self.by_width.values()
        return max(values) / min(values) if all(map(_is_update, values)) else None


@dataclass(frozen=True)
class CoordinateCheck:
    """The updates of several structures, the command that measured them, and the data in a sentence."""

    updates: tuple[FeatureUpdates, ...]
    command: str
    source: str


def write_updates(folder: Path, updates: Sequence[FeatureUpdates], command: str, source: str) -> Path:
    """Write the file of a results folder; NaN and infinities become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / FILE, []
    for update in updates:
        by_width = {width: value if math.isfinite(value) else None for width, value in update.by_width.items()}
        content.append({**vars(update), "by_width": by_width})
    write_json(path, {"format": _FORMAT, "command": command, "source": source, "updates": content})
    return path


def read_updates(folder: Path) -> CoordinateCheck | None:
    """Read the file of a results folder; None without a file. Raises ValueError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {_FORMAT}")
        updates = []
        for update in content["updates"]:
            by_width = {int(width): math.nan if v is None else float(v) for width, v in update["by_width"].items()}
            updates.append(FeatureUpdates(str(update["structure"]), bool(update["structure_aware"]), by_width))
        return CoordinateCheck(tuple(updates), str(content["command"]), str(content["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the coordinate check in {path} cannot be read: {error}") from None


def section(check: CoordinateCheck) -> Section:
    updates = check.updates
    structures = list(dict.fromkeys(update.structure for update in updates))
    widths = sorted({width for update in updates for width in update.by_width})
    traces, data, rows = [], [], []
    for update in updates:
        i, name = structures.index(update.structure), update.name
        values = [value if _is_update(value) else None for value in update.by_width.values()]
        label = f"{escape(name)}, width %{{x}}<br>relative update %{{y:.4g}}"
        draw = partial(trace, update.by_width, values, colour(i), label, name=name, showlegend=True, line=1.5)
        if update.structure_aware:
            traces.append(draw(symbol=symbol(i)))
        else:
            traces.append(draw(symbol=f"{symbol(i)}-open", line_dash="dot"))
        run = {"structure": update.structure, "structure_aware": update.structure_aware}
        for width, value in zip(update.by_width, values, strict=True):
            data.append({**run, "width": width, "relative_update": "" if value is None else value})
        cells = (_cell(update.by_width.get(width)) for width in widths)
        rows.append([Cell(name, name, i), *cells, Cell.of(update.max_over_min, ".2f")])
    shown = [value for update in updates for value in update.by_width.values() if _is_update(value)]
    caption = Markup(
        "Root mean square of the change of the features after the last block in one step, divided by that of the "
        "features; mean over the steps. Dotted: the naive control, in which all factors have the learning rate of a "
        "dense layer."
    )
    text = Markup("<p>A horizontal line means that the learning rate transfers across widths. {}.</p>")
    chart = Chart(traces, size_axis("width", widths), log_axis(shown, "relative feature update per step"))
    table = SortableTable(("structure", *(f"width {width}" for width in widths), "largest / smallest"), rows)
    figures = [Figure("feature-updates", caption, {"": [chart]}, data)]
    return Section("Feature updates by width", text.format(check.source.rstrip(".")), figures, [table])


def _is_update(value: float) -> bool:
    """Return whether a value is positive and finite: divergence gives NaN or infinity, frozen features give zero."""
    return 0 < value < math.inf


def _cell(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell.of(value, ".4g") if _is_update(value) or value == 0 else Cell("diverged")
