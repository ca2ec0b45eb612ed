"""One self-contained page about a results folder: it loads nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from einlinear.experiments.config import DENSE
from einlinear.experiments.plots import colour, nice_ticks, style, symbol
from einlinear.experiments.store import read_experiment, read_results, write_text
from einlinear.experiments.summary import Curve, summarise


def write_report(folder: str | Path) -> Path:
    """Write report.html into a results folder, about all runs in it.

    Raises:
        ValueError: the folder is no results folder, another version's, or has no finished run.
    """
    folder = Path(folder)
    experiment = read_experiment(folder)
    results, _ = read_results(folder)
    if not results:
        raise ValueError(f"{folder} has no finished runs yet")
    curves = summarise(results, experiment.structures)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        files("einlinear.experiments").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        experiment=experiment,
        curves=curves,
        rows=[row for curve in curves for row in curve.rows],
        colours={curve.structure: colour(i) for i, curve in enumerate(curves)},
        headline=headline(curves),
        seeds=len({result.seed for result in results}),
        date=datetime.now().strftime("%d %B %Y, %H:%M"),
        plotly_js=Markup(get_plotlyjs()),
        loss_figure=_div(loss_figure(curves), "loss"),
        accuracy_figure=_div(accuracy_figure(curves), "accuracy"),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def headline(curves: Sequence[Curve]) -> str:
    """The main result in one sentence: the largest compute multiplier."""
    found = [(row, row.multiplier.mean) for curve in curves for row in curve.rows if row.multiplier]
    gains = [(row, mean) for row, mean in found if mean and mean.value > 1 and mean.bound != "<"]
    if not found:
        return f"Nothing to compare with: {DENSE} is not among the structures that finished."
    if not gains:
        return "No structure reached its training loss with fewer MACs than dense needs for the same."
    row, mean = max(gains, key=lambda gain: gain[1].value)
    return (
        f"Largest compute multiplier: dense needs {'more than ' if mean.bound else ''}{mean.value:.1f} times the MACs "
        f"of {row.structure} at width {row.width} ({row.macs:,} per image) for the same training loss."
    )


def loss_figure(curves: Sequence[Curve]) -> go.Figure:
    """Training loss over MACs, both logarithmic: every seed, the means, the fitted power laws."""
    figure = go.Figure()
    for i, curve in enumerate(curves):
        _add_points(figure, i, curve, [row.train_losses for row in curve.rows], "train loss %{y:.4f}")
        if curve.law:
            ends = [curve.rows[0].macs, curve.rows[-1].macs]
            figure.add_trace(
                go.Scatter(
                    x=ends,
                    y=[curve.law(macs) for macs in ends],
                    mode="lines",
                    line={"color": colour(i), "width": 1.5},
                    legendgroup=curve.structure,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
    losses = [loss for curve in curves for row in curve.rows for loss in row.train_losses]
    _layout(figure, curves, "Training loss of the last epoch")
    ticks = nice_ticks(min(losses, default=0.1), max(losses, default=1.0))
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def accuracy_figure(curves: Sequence[Curve]) -> go.Figure:
    """Test accuracy over MACs: every seed, and a line through the means."""
    figure = go.Figure()
    for i, curve in enumerate(curves):
        _add_points(figure, i, curve, [row.test_accuracies for row in curve.rows], "test accuracy %{y:.2%}", "lines+")
    _layout(figure, curves, "Test accuracy")
    figure.update_yaxes(tickformat=".0%")
    return figure


def _add_points(
    figure: go.Figure, i: int, curve: Curve, values: Sequence[Sequence[float]], hover: str, lines: str = ""
) -> None:
    """The means of one structure, and behind them the seeds where there are several."""
    hover = f"{curve.structure}, width %{{customdata}}<br>%{{x:,}} MACs per image<br>{hover}<extra></extra>"
    rows = [(row, own) for row, own in zip(curve.rows, values, strict=True) if own]
    if any(len(own) > 1 for _, own in rows):
        figure.add_trace(
            go.Scatter(
                x=[row.macs for row, own in rows for _ in own],
                y=[value for _, own in rows for value in own],
                customdata=[row.width for row, own in rows for _ in own],
                mode="markers",
                marker={"color": colour(i), "symbol": f"{symbol(i)}-open", "size": 5},
                opacity=0.6,
                legendgroup=curve.structure,
                showlegend=False,
                hovertemplate=hover,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[row.macs for row, _ in rows],
            y=[sum(own) / len(own) for _, own in rows],
            customdata=[row.width for row, _ in rows],
            mode=f"{lines}markers",
            marker={"color": colour(i), "symbol": symbol(i), "size": 9},
            line={"color": colour(i), "width": 1.5},
            name=curve.structure,
            legendgroup=curve.structure,
            hovertemplate=hover,
        )
    )


def _layout(figure: go.Figure, curves: Sequence[Curve], title: str) -> None:
    style(figure)
    macs = [row.macs for curve in curves for row in curve.rows]
    ticks = nice_ticks(min(macs), max(macs))
    figure.update_xaxes(title="MACs per image", type="log", tickvals=ticks, ticktext=[_short(t) for t in ticks])
    figure.update_yaxes(title=title)


def _short(number: float) -> str:
    """50000 -> 50k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"


def _div(figure: go.Figure, name: str) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config))
