"""The shape of every figure (title, caption, charts, tables), and a self-contained HTML page of all figures."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from einlinear_lab.analysis.columns import Column
from einlinear_lab.report.charts import Chart, colour, glyph

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

    @classmethod
    def of(
        cls,
        columns: Sequence[Column],
        note: Markup | str = "",
        summary: str = "",
        curves: Sequence[int] | None = None,
    ) -> SortableTable:
        """Return the table of some columns; the first one is marked with the curves of the rows, if they are given."""
        rows = [
            [Cell(text, value) for text, value in row]
            for row in zip(*(zip(column.texts, column.values, strict=True) for column in columns), strict=True)
        ]
        for row, curve in zip(rows, curves or ()):
            row[0] = replace(row[0], curve=curve)
        return cls([column.heading for column in columns], rows, Markup(note), summary)


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


def definitions(terms: Mapping[str, str]) -> Markup:
    """Return an HTML list of terms and their values."""
    pairs = (Markup("<dt>{}</dt><dd>{}</dd>\n").format(term, text) for term, text in terms.items())
    return Markup("<dl>\n{}</dl>\n").format(Markup().join(pairs))


def _asset(name: str) -> str:
    return files("einlinear_lab.report").joinpath(name).read_text(encoding="utf-8")
