"""Coordinate check: how much one training step changes the features at every width, on disk and as a figure.

FOLDER/coord-check.json   {"format": 1, "command": ..., "source": ..., "updates": [
                              {"structure": ..., "structure_aware": ..., "by_width": {"64": 0.1, "256": null}}, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from einlinear.files import read_json, write_json
from einlinear_lab.report.charts import Chart, colour, log_axis, symbol, trace, width_axis
from einlinear_lab.report.page import Cell, Figure, Section, SortableTable

FILE = "coord-check.json"
_FORMAT = 1


@dataclass(frozen=True)
class FeatureUpdates:
    """The relative change of the features after the last block in one step, by width.

    Attributes:
        structure: the spec.
        structure_aware: whether every factor had its own learning rate; the naive control has that of a dense layer.
        by_width: width -> root mean square of the change over that of the features, mean over the steps; NaN or
            infinite where the run diverged.
    """

    structure: str
    structure_aware: bool
    by_width: dict[int, float]

    @property
    def name(self) -> str:
        """The structure, marked if naive."""
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
    content = [
        {**vars(update), "by_width": {w: v if math.isfinite(v) else None for w, v in update.by_width.items()}}
        for update in updates
    ]
    path = folder / FILE
    write_json(path, {"format": _FORMAT, "command": command, "source": source, "updates": content})
    return path


def read_updates(folder: Path) -> CoordinateCheck | None:
    """Read the file of a results folder; None without a file.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {_FORMAT}")
        updates = tuple(
            FeatureUpdates(
                str(update["structure"]),
                bool(update["structure_aware"]),
                {int(width): math.nan if v is None else float(v) for width, v in update["by_width"].items()},
            )
            for update in content["updates"]
        )
        return CoordinateCheck(updates, str(content["command"]), str(content["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the coordinate check in {path} cannot be read: {error}") from None


def section(check: CoordinateCheck) -> Section:
    """Show the updates by width."""
    updates = check.updates
    structures = list(dict.fromkeys(update.structure for update in updates))
    widths = sorted({width for update in updates for width in update.by_width})
    traces = []
    for update in updates:
        i = structures.index(update.structure)
        traces.append(
            trace(
                update.by_width,
                [value if _is_update(value) else None for value in update.by_width.values()],
                colour(i),
                f"{escape(update.name)}, width %{{x}}<br>relative update %{{y:.4g}}",
                name=update.name,
                legend=True,
                symbol=symbol(i) if update.structure_aware else f"{symbol(i)}-open",
                line=1.5,
                dash="solid" if update.structure_aware else "dot",
            )
        )
    values = [value for update in updates for value in update.by_width.values()]
    updated = log_axis(filter(_is_update, values), "relative feature update per step")
    caption = Markup(
        "Root mean square of the change of the features after the last block in one step, divided by that of the "
        "features; mean over the steps. Dotted: the naive control, in which all factors have the learning rate of a "
        "dense layer."
    )
    data = [
        {
            "structure": update.structure,
            "structure_aware": update.structure_aware,
            "width": width,
            "relative_update": value if _is_update(value) else "",
        }
        for update in updates
        for width, value in update.by_width.items()
    ]
    rows = [
        [
            Cell(update.name, update.name, structures.index(update.structure)),
            *(_cell(update.by_width.get(width)) for width in widths),
            Cell.of(update.max_over_min, ".2f"),
        ]
        for update in updates
    ]
    text = Markup("<p>A horizontal line means that the learning rate transfers across widths. {}.</p>")
    return Section(
        "Feature updates by width",
        text.format(check.source.rstrip(".")),
        [Figure("feature-updates", caption, {"": [Chart(traces, width_axis(widths), updated)]}, data)],
        [SortableTable(("structure", *(f"width {width}" for width in widths), "largest / smallest"), rows)],
    )


def _is_update(value: float) -> bool:
    """Return whether a value is positive and finite: divergence gives NaN or infinity, frozen features give zero."""
    return 0 < value < math.inf


def _cell(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell.of(value, ".4g") if _is_update(value) or value == 0 else Cell("diverged")
