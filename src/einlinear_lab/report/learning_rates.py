"""Learning-rate landscapes: the loss over the learning rate at every size, and where its optimum lies."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from einlinear_lab.findings.learning_rates import Landscape, Optimum, landscapes, largest_over_smallest
from einlinear_lab.findings.summary import TRAIN_LOSS, Curve, Study, in_words, result, value
from einlinear_lab.report.page import Cell, CsvRow, Figure, Panel, Section, Table, csv_row, hover, hover_of_mean
from einlinear_lab.report.plots import colour, log_axis, shade, style, symbol

Found = Sequence[tuple[Curve, Sequence[Landscape]]]

_HEIGHT = 340


def learning_rates(study: Study, commands: Sequence[str]) -> Section | None:
    """The section, if some model was trained at three learning rates or more."""
    found = {measure: _landscapes(study, measure) for measure in study.measures}
    if not any(found.values()):
        return None
    views = {in_words(measure): _panels(own, measure) for measure, own in found.items()}
    optima = {in_words(measure): [Panel("", _optima(own))] for measure, own in found.items()}
    data = _data(found[study.error], study)
    figures = [
        Figure(
            "learning-rates",
            Markup(
                "One line per size, means over the seeds; open marks: single seeds. Large ring: the optimum, of the "
                "parabola through the lowest point and its neighbours. Crosses at the top: diverged. <i>Naive</i>: all "
                "factors learn at the rate of a dense layer. All panels have the same axes."
            ),
            views,
            data,
        ),
        Figure(
            "best-learning-rates",
            Markup(
                "The optima by width: a level line means that the learning rate carries over. Bars: the range over "
                "single seeds. Open marks: the optimum is at an end of the learning rates that were tried, or beyond."
            ),
            optima,
            _optima_data(found),
        ),
    ]
    tables = [_table(own, measure) for measure, own in found.items()]
    return Section("Learning rates", Markup(), [*figures, *tables], commands)


def _landscapes(study: Study, measure: str) -> Found:
    """The landscapes of every curve that has any."""
    found = [(curve, landscapes(study, curve, measure)) for curve in study.curves]
    return [(curve, own) for curve, own in found if own]


def _panels(found: Found, measure: str) -> list[Panel]:
    rows = [row for _, own in found for landscape in own for row in landscape.rows]
    rates = [row.run.training.lr for row in rows]
    losses = [loss for row in rows for loss in row.values(measure) if loss > 0]
    widths = _widths(found)
    sizes = sorted(widths, key=widths.__getitem__)
    top = 1.08 * max(losses, default=1.0)
    panels = []
    for curve, own in found:
        figure = go.Figure()
        for landscape in own:
            _add(figure, landscape, measure, sizes.index(landscape.size), len(sizes), top)
        style(figure)
        figure.update_layout(height=_HEIGHT)
        figure.update_xaxes(**log_axis(rates, "learning rate"))
        figure.update_yaxes(**log_axis([*losses, top], in_words(measure)))
        panels.append(Panel(curve.name, figure))
    return panels


def _add(figure: go.Figure, landscape: Landscape, measure: str, i: int, count: int, top: float) -> None:
    """Draw one size: seeds, means, those that diverged, and the optimum."""
    look = {"color": shade(i, count), "symbol": symbol(i)}
    template = "%{customdata}<br>%{y:.4g}<extra></extra>"
    good = [row for row in landscape.rows if row.good]
    common = {"legendgroup": landscape.size, "hovertemplate": template}
    seeds = [record for row in good if len(row.good) > 1 for record in row.good]
    if seeds:
        figure.add_scatter(
            x=[record.run.training.lr for record in seeds],
            y=[value(record, measure) for record in seeds],
            customdata=[hover(record) for record in seeds],
            mode="markers",
            marker={**look, "symbol": f"{symbol(i)}-open", "size": 4},
            opacity=0.6,
            showlegend=False,
            **common,
        )
    figure.add_scatter(
        x=[row.run.training.lr for row in good],
        y=[row.mean(measure) for row in good],
        customdata=[hover_of_mean(row.good) for row in good],
        mode="lines+markers",
        marker={**look, "size": 7},
        line={"color": shade(i, count), "width": 1.5},
        name=landscape.size,
        **common,
    )
    gone = [record for row in landscape.rows for record in row.records if result(record).diverged]
    if gone:
        figure.add_scatter(
            x=[record.run.training.lr for record in gone],
            y=[top] * len(gone),
            customdata=[f"{hover(record)}<br>diverged" for record in gone],
            mode="markers",
            marker={"color": shade(i, count), "symbol": "x-thin-open", "size": 9, "line": {"width": 2}},
            showlegend=False,
            legendgroup=landscape.size,
            hovertemplate="%{customdata}<extra></extra>",
        )
    if landscape.optimum:
        lr = landscape.optimum.lr
        nearest = min(good, key=lambda row: max(row.run.training.lr / lr, lr / row.run.training.lr))
        figure.add_scatter(
            x=[lr],
            y=[nearest.mean(measure)],
            mode="markers",
            marker={"color": shade(i, count), "symbol": "circle-open", "size": 15, "line": {"width": 2}},
            showlegend=False,
            legendgroup=landscape.size,
            hovertemplate=f"{landscape.size}: optimum {lr:.3g}<extra></extra>",
        )


def _optima(found: Found) -> go.Figure:
    figure = go.Figure()
    shown: list[float] = []
    widths: set[int] = set()
    for i, (curve, models) in enumerate(found):
        optima = [(model, model.optimum) for model in models if model.optimum]
        naive = curve.options.get("structure_aware") is False
        figure.add_scatter(
            x=[model.width for model, _ in optima],
            y=[best.lr for _, best in optima],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, best.largest - best.lr) for _, best in optima],
                "arrayminus": [max(0.0, best.lr - best.smallest) for _, best in optima],
                "thickness": 1,
            },
            customdata=[model.size for model, _ in optima],
            mode="lines+markers",
            marker={
                "color": colour(i),
                "symbol": [f"{symbol(i)}-open" if best.bound else symbol(i) for _, best in optima],
                "size": 9,
            },
            line={"color": colour(i), "width": 1.5, "dash": "dot" if naive else "solid"},
            name=curve.name,
            hovertemplate=f"{Markup.escape(curve.name)}, %{{customdata}}<br>optimum %{{y:.3g}}<extra></extra>",
        )
        shown += [end for _, best in optima for end in (best.smallest, best.lr, best.largest)]
        widths |= {model.width for model, _ in optima}
    style(figure)
    figure.update_xaxes(title="width", type="log", tickvals=sorted(widths), ticktext=[str(w) for w in sorted(widths)])
    figure.update_yaxes(**log_axis(shown, "best learning rate"))
    return figure


def _table(found: Found, measure: str) -> Table:
    """The optima: a row per curve, a column per size."""
    widths = _widths(found)
    ordered = sorted(widths, key=widths.__getitem__)
    rows = []
    for i, (curve, own) in enumerate(found):
        by_size = {landscape.size: landscape.optimum for landscape in own}
        times = largest_over_smallest(own)
        cells = [_optimum(by_size[size]) if size in by_size else Cell("") for size in ordered]
        last = Cell(times.text.replace(">", "≥"), times.value) if times else Cell("–")
        rows.append([Cell(curve.name, curve.name, i), last, *cells])
    note = Markup(
        "Best learning rate by {}, in brackets the range over single seeds. ≤ and ≥: at an end of those that "
        "were tried. <b>Largest / smallest</b>: 1 where one learning rate is best at every size; ≥ and – where an "
        "optimum is at an end, so that the runs do not tell."
    )
    return Table((f"best by {in_words(measure)}", "largest / smallest", *ordered), rows, note.format(in_words(measure)))


def _optimum(best: Optimum | None) -> Cell:
    if best is None:
        return Cell("diverged")
    sign = {"": "", "<": "≤ ", ">": "≥ "}[best.bound]
    ends = "" if best.smallest == best.largest else f" ({best.smallest:.2g} to {best.largest:.2g})"
    return Cell(f"{sign}{best.lr:.2g}{ends}", best.lr)


def _widths(found: Found) -> dict[str, int]:
    """The width of every size."""
    return {model.size: model.width for _, models in found for model in models}


def _data(found: Found, study: Study) -> list[CsvRow]:
    measures = (study.error, TRAIN_LOSS)
    return [
        csv_row(
            curve.name,
            record,
            diverged=result(record).diverged,
            **{measure: value(record, measure) for measure in measures},
        )
        for curve, own in found
        for landscape in own
        for row in landscape.rows
        for record in row.records
    ]


def _optima_data(found: dict[str, Found]) -> list[CsvRow]:
    return [
        {
            "curve": curve.name,
            "structure": curve.structure,
            "size": model.size,
            "width": model.width,
            "measure": measure,
            "best_lr": best.lr,
            "smallest": best.smallest,
            "largest": best.largest,
            "bound": best.bound,
        }
        for measure, own in found.items()
        for curve, models in own
        for model in models
        if (best := model.optimum)
    ]
