"""A page of sections, and turning it into one HTML file that loads nothing."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from einlinear_lab.findings.summary import result
from einlinear_lab.report.plots import colour, glyph
from einlinear_lab.runs.records import Record

CsvRow = Mapping[str, object]


@dataclass(frozen=True)
class Panel:
    """One plot; its title may be empty."""

    title: str
    plot: go.Figure


@dataclass(frozen=True)
class Figure:
    """Plots that belong together.

    Attributes:
        name: of the file with its numbers; no other figure of the section has it.
        caption: below it, as HTML.
        views: its panels, by the name of what the reader can choose to see; a single one leaves no choice.
        data: its numbers, a row per point.
    """

    name: str
    caption: Markup
    views: Mapping[str, Sequence[Panel]]
    data: Sequence[CsvRow]

    @property
    def csv(self) -> str:
        """The numbers as a data: URI."""
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.data for name in row)
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: that is shown.
        value: to sort by; None sorts last. A text sorts as such.
        mark: which curve's colour and symbol stand before the text.
    """

    text: str
    value: float | str | None = None
    mark: int | None = None


@dataclass(frozen=True)
class Table:
    """A table that a click on a heading sorts.

    Attributes:
        headings: of the columns.
        rows: as many cells each.
        note: below it, as HTML.
        summary: where it is folded up, what can be seen of it.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: Markup = field(default=Markup())
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """What can be said about one thing.

    Attributes:
        title: its heading.
        text: below the heading, as HTML.
        parts: figures and tables, from top to bottom.
        commands: that made the runs which are shown.
    """

    title: str
    text: Markup = field(default=Markup())
    parts: Sequence[Figure | Table] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Chapter:
    """Sections about one study or coordinate check; the title is shown where there are several chapters."""

    title: str
    sections: Sequence[Section]


def render(
    title: str, headline: str, warnings: Sequence[str], chapters: Sequence[Chapter], footer: Mapping[str, str]
) -> str:
    """The page.

    Args:
        title, headline: at the top.
        warnings: that the reader must not miss.
        chapters: all there is to show.
        footer: how the page was made.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"plot": _plot, "colour": colour, "glyph": glyph}
    return environment.from_string(_asset("page.html.jinja")).render(
        title=title,
        headline=headline,
        warnings=warnings,
        chapters=chapters,
        footer=definitions(footer),
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly_js=Markup(get_plotlyjs()),
    )


def hover(record: Record) -> str:
    """Which run a point is."""
    run = record.run
    return (
        f"{Markup.escape(run.model.structure)}, width {run.model.width}<br>"
        f"lr {run.training.lr:g}, seed {run.seed}<br>key {run.key}"
    )


def hover_of_mean(records: Sequence[Record]) -> str:
    """Which runs a point is the mean of."""
    if len(records) == 1:
        return hover(records[0])
    run, keys = records[0].run, ", ".join(record.run.key for record in records[:4])
    seeds = ", ".join(str(record.run.seed) for record in records)
    return (
        f"{Markup.escape(run.model.structure)}, width {run.model.width}<br>"
        f"lr {run.training.lr:g}, mean of seeds {seeds}<br>keys {keys}{' …' if len(records) > 4 else ''}"
    )


def csv_row(curve: str, record: Record, **values: object) -> CsvRow:
    """A point of a run: what it is, its costs, and the values of the point."""
    run, own = record.run, result(record)
    return {
        "key": run.key,
        "curve": curve,
        "structure": run.model.structure,
        "structure_aware": run.training.structure_aware,
        "width": run.model.width,
        "lr": run.training.lr,
        "seed": run.seed,
        "macs": own.macs,
        "params": own.params,
        **values,
    }


def paragraphs(texts: Iterable[str]) -> Markup:
    """HTML of plain texts."""
    return Markup().join(Markup("<p>{}</p>\n").format(text) for text in texts)


def definitions(terms: Mapping[str, str]) -> Markup:
    """HTML of terms and what they are."""
    pairs = (Markup("<dt>{}</dt><dd>{}</dd>\n").format(term, text) for term, text in terms.items())
    return Markup("<dl>\n{}</dl>\n").format(Markup().join(pairs))


def _asset(name: str) -> str:
    return files("einlinear_lab.report").joinpath(name).read_text(encoding="utf-8")


def _plot(panel: Panel, name: str) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Markup(panel.plot.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
