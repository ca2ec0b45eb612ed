"""What changes during training: the loss of every run, over its steps and over time, and the load of its experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray

from einlinear_lab.findings.summary import Study
from einlinear_lab.report.page import CsvRow, Figure, Panel, Section, csv_row, hover
from einlinear_lab.report.plots import colour, log_axis, style
from einlinear_lab.runs.records import METRICS, Record
from einlinear_lab.training import metrics

_AT_MOST = 48  # runs that are drawn; more are a carpet
_POINTS = 200  # of a line
_SMOOTH = 0.02  # of a run: half a window of the running mean
_LOOK = f"smoothed by a running mean over {2 * _SMOOTH:.0%} of the steps; wider models have wider lines"
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Line:
    curve: str
    record: Record
    steps: Array
    seconds: Array
    values: Array


def training_curves(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if runs noted down their losses at several steps."""
    lines = _lines(_order(study), "train_loss")
    if not lines:
        return None
    views = {
        "by steps": [Panel("", _plot(lines, study, "steps", "training loss"))],
        "by time": [Panel("", _plot(lines, study, "seconds", "training loss"))],
    }
    text = "" if len(lines) == len(study.records) else f"{len(lines)} of {len(study.records)} runs. "
    caption = Markup(
        "{}Loss of the batches, {}. Seconds: of training alone, without loading data and evaluations."
    ).format(text, _LOOK)
    data = _data(lines, "smoothed_train_loss")
    return Section("Training curves", Markup(), [Figure("training-curves", caption, views, data)], commands)


def expert_loads(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if there are mixtures of experts."""
    measures = {"largest load": "moe_largest", "entropy": "moe_entropy"}
    runs = [(curve, record) for curve, record in _order(study) if record.run.model.experts is not None]
    lines = {name: _lines(runs, measure) for name, measure in measures.items()}
    if not all(lines.values()):
        return None
    views = {name: [Panel("", _plot(own, study, "steps", name))] for name, own in lines.items()}
    caption = Markup(
        "<b>Largest load</b>: tokens of the most used expert of all mixtures, over those of an even load. "
        "<b>Entropy</b>: of the shares of the experts, over that of an even load, on average over the mixtures: 1 is "
        "even, 0 all tokens on one expert. Both of one batch, {}."
    ).format(_LOOK)
    data = [row for name, own in lines.items() for row in _data(own, f"smoothed_{measures[name]}")]
    return Section("Load of the experts", Markup(), [Figure("expert-loads", caption, views, data)], commands)


def _lines(runs: Sequence[tuple[str, Record]], measure: str) -> list[_Line]:
    return [line for curve, record in runs[:_AT_MOST] if (line := _line(curve, record, measure))]


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


def _line(curve: str, record: Record, measure: str) -> _Line | None:
    """None where the run noted the measure down less than twice."""
    lines = [line for line in metrics.read(record.folder / METRICS) if line.get(measure) is not None]
    if len(lines) < 2:
        return None
    steps = np.array([line["step"] for line in lines], dtype=float)
    seconds = np.array([line["training_seconds"] for line in lines], dtype=float)
    values = _smooth(steps, np.array([line[measure] for line in lines], dtype=float))
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
    return _Line(curve, record, steps[shown], seconds[shown], values[shown])


def _smooth(steps: Array, values: Array) -> Array:
    """The mean over a window around every step, narrower towards the ends so that it stays in the middle."""
    half = np.minimum(_SMOOTH * steps[-1], np.minimum(steps - steps[0], steps[-1] - steps))
    first = np.searchsorted(steps, steps - half - 1e-9)
    last = np.searchsorted(steps, steps + half + 1e-9)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _plot(lines: Sequence[_Line], study: Study, over: str, title: str) -> go.Figure:
    figure, names = go.Figure(), [curve.name for curve in study.curves]
    widths = sorted({line.record.run.model.width for line in lines})
    shown: set[str] = set()
    for line in lines:
        i = names.index(line.curve)
        place = widths.index(line.record.run.model.width) / max(1, len(widths) - 1)
        figure.add_scatter(
            x=getattr(line, over).tolist(),
            y=line.values.tolist(),
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
    values = [value for line in lines for value in line.values.tolist()]
    if min(values) > 0:
        figure.update_yaxes(**log_axis(values, title))
    else:
        figure.update_yaxes(title=title)
    return figure


def _data(lines: Sequence[_Line], name: str) -> list[CsvRow]:
    return [
        csv_row(line.curve, line.record, step=int(step), seconds=seconds, **{name: value})
        for line in lines
        for step, seconds, value in zip(line.steps.tolist(), line.seconds.tolist(), line.values.tolist(), strict=True)
    ]
