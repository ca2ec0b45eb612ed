"""The shape of every figure (title, caption, charts, tables), and a self-contained HTML page of all figures."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from einlinear_lab.report.charts import Chart, colour, glyph
from einlinear_lab.report.comparison import SeedGroup, result_of
from einlinear_lab.runs.records import Record

CsvRow = Mapping[str, object]


@dataclass(frozen=True)
class Figure:
    """Charts with one caption, and their data as CSV.

    Attributes:
        name: the name of the CSV file, unique within a section.
        views: the charts by the name of the view; several views give the reader buttons to choose.
        data: a row per point.
    """

    name: str
    caption: Markup
    views: Mapping[str, Sequence[Chart]]
    data: Sequence[CsvRow]

    @property
    def csv(self) -> str:
        """The data as a data: URI."""
        text, names = io.StringIO(), dict.fromkeys(name for row in self.data for name in row)
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        value: the sort key, a number or a text; None sorts last.
        curve: the index of a curve, whose colour and symbol precede the text.
    """

    text: str
    value: float | str | None = None
    curve: int | None = None

    @classmethod
    def of(cls, value: float | str | None, form: str = "", missing: str = "–") -> Cell:
        """Return the cell of a value in a format such as ".3g", sorted by the value."""
        return cls(missing if value is None else format(value, form), value)


@dataclass(frozen=True)
class SortableTable:
    """A table that a click on a heading sorts, with an HTML note below it; a table with a summary is folded up."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: Markup = field(default=Markup())
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, an introduction as HTML, and figures and tables from top to bottom, about one question."""

    title: str
    text: Markup = field(default=Markup())
    figures: Sequence[Figure] = ()
    tables: Sequence[SortableTable] = ()


@dataclass(frozen=True)
class Chapter:
    """Sections and the commands of their runs, under a title that is shown where the page has several chapters."""

    title: str
    sections: Sequence[Section]
    commands: Sequence[str]


def render(headline: str, warnings: Sequence[str], chapters: Sequence[Chapter], footer: Mapping[str, str]) -> str:
    """Render the page as one HTML file: headline and warnings, the content, and how the page was made."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"colour": colour, "glyph": glyph}
    return environment.from_string(_asset("page.html.jinja")).render(
        title="Structured linear layers side by side",
        headline=headline,
        warnings=warnings,
        chapters=chapters,
        footer=definitions(footer),
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly_js=Markup(get_plotlyjs()),
    )


def hover(*records: Record) -> str:
    """Return the hover label of a point: the run, or the runs of several seeds whose mean the point is."""
    run, keys = records[0].run, ", ".join(record.run.key for record in records[:4])
    one = len(records) == 1
    seeds = f"seed {run.seed}" if one else f"mean of seeds {', '.join(str(record.run.seed) for record in records)}"
    return (
        f"{escape(run.model.structure)}, width {run.model.width}<br>lr {run.training.lr:g}, {seeds}<br>"
        f"{'key' if one else 'keys'} {keys}{' …' if len(records) > 4 else ''}"
    )


def run_row(curve: str, record: Record, **values: object) -> CsvRow:
    """Return the CSV row of a point of a run: its configuration, its costs, and the values of the point."""
    run, result = record.run, result_of(record)
    model, training = run.model, run.training
    names = {"key": run.key, "curve": curve, "structure": model.structure, "structure_aware": training.structure_aware}
    sizes = {"width": model.width, "lr": training.lr, "seed": run.seed, "macs": result.macs, "params": result.params}
    return {**names, **sizes, **values}


def group_row(group: SeedGroup, **values: object) -> CsvRow:
    """Return the CSV row of a mean over seeds: the configuration, the MACs, and the values of the point."""
    model = group.run.model
    return {"structure": model.structure, "width": model.width, "macs": group.result.macs, **values}


def definitions(terms: Mapping[str, str]) -> Markup:
    """Return an HTML list of terms and their values."""
    pairs = (Markup("<dt>{}</dt><dd>{}</dd>\n").format(term, text) for term, text in terms.items())
    return Markup("<dl>\n{}</dl>\n").format(Markup().join(pairs))


def _asset(name: str) -> str:
    return files("einlinear_lab.report").joinpath(name).read_text(encoding="utf-8")
