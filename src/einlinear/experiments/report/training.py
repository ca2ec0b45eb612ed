"""Training curves: the loss of every run over its steps and over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray

from einlinear.experiments.findings.summary import Study
from einlinear.experiments.report.page import CsvRow, Figure, Panel, Section, csv_row, hover
from einlinear.experiments.report.plots import colour, log_axis, style
from einlinear.experiments.runs.records import METRICS, Record
from einlinear.training import metrics

_AT_MOST = 48  # runs that are drawn; more are a carpet
_POINTS = 200  # of a line
_SMOOTH = 0.02  # of a run: half a window of the running mean
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Line:
    curve: str
    record: Record
    steps: Array
    seconds: Array
    losses: Array


def training_curves(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if runs noted down their losses at several steps."""
    lines = [line for name, record in _order(study)[:_AT_MOST] if (line := _line(name, record))]
    if not lines:
        return None
    names = [curve.name for curve in study.curves]
    views = {
        "by steps": [Panel("", _plot(lines, names, "steps"))],
        "by time": [Panel("", _plot(lines, names, "seconds"))],
    }
    text = "" if len(lines) == len(study.records) else f"{len(lines)} of {len(study.records)} runs. "
    caption = Markup(
        "{}Loss of the batches, smoothed by a running mean over {:.0%} of the steps; wider models have wider lines. "
        "Seconds: of training alone, without loading data and evaluations."
    ).format(text, 2 * _SMOOTH)
    return Section("Training curves", Markup(), [Figure("training-curves", caption, views, _data(lines))], commands)


def _order(study: Study) -> list[tuple[str, Record]]:
    """All runs with the names of their curves: those at the best learning rates come first, and first seeds."""
    best = [row for curve in study.curves for row in curve.best]
    others = [row for row in study.rows if row not in best]
    return [
        (row.curve, record)
        for rows in (best, others)
        for of_one_seed in itertools.zip_longest(*([(row, record) for record in row.records] for row in rows))
        for row, record in filter(None, of_one_seed)
    ]


def _line(curve: str, record: Record) -> _Line | None:
    lines = [line for line in metrics.read(record.folder / METRICS) if line.get("train_loss") is not None]
    if len(lines) < 2:
        return None
    steps = np.array([line["step"] for line in lines], dtype=float)
    seconds = np.array([line["training_seconds"] for line in lines], dtype=float)
    losses = _smooth(steps, np.array([line["train_loss"] for line in lines]))
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
    return _Line(curve, record, steps[shown], seconds[shown], losses[shown])


def _smooth(steps: Array, losses: Array) -> Array:
    """The mean over a window around every step, narrower towards the ends so that it stays in the middle."""
    half = np.minimum(_SMOOTH * steps[-1], np.minimum(steps - steps[0], steps[-1] - steps))
    first = np.searchsorted(steps, steps - half - 1e-9)
    last = np.searchsorted(steps, steps + half + 1e-9)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _plot(lines: Sequence[_Line], names: Sequence[str], over: str) -> go.Figure:
    figure = go.Figure()
    widths = sorted({line.record.run.model.width for line in lines})
    shown: set[str] = set()
    for line in lines:
        i = names.index(line.curve)
        place = widths.index(line.record.run.model.width) / max(1, len(widths) - 1)
        figure.add_scatter(
            x=getattr(line, over).tolist(),
            y=line.losses.tolist(),
            mode="lines",
            line={"color": colour(i), "width": 0.8 + 1.7 * place, "dash": _DASHES[i // 8 % len(_DASHES)]},
            opacity=0.8,
            name=line.curve,
            legendgroup=line.curve,
            showlegend=line.curve not in shown,
            hovertemplate=f"{hover(line.record)}<br>%{{x:.4g}} {over}: %{{y:.4g}}<extra></extra>",
        )
        shown.add(line.curve)
    style(figure)
    figure.update_xaxes(title="steps" if over == "steps" else "seconds", rangemode="tozero")
    losses = [loss for line in lines for loss in line.losses.tolist()]
    if min(losses) > 0:
        figure.update_yaxes(**log_axis(losses, "training loss"))
    else:
        figure.update_yaxes(title="training loss")
    return figure


def _data(lines: Sequence[_Line]) -> list[CsvRow]:
    return [
        csv_row(line.curve, line.record, step=int(step), seconds=seconds, smoothed_train_loss=loss)
        for line in lines
        for step, seconds, loss in zip(line.steps.tolist(), line.seconds.tolist(), line.losses.tolist(), strict=True)
    ]
