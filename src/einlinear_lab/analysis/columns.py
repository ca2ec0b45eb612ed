"""Columns of numbers, each with its text, for tables of commands and of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = "–"

Number = float | str | None


@dataclass(frozen=True)
class Column:
    """A column of a table: the numbers (or names) by which it sorts, and their texts."""

    heading: str
    values: Sequence[Number]
    texts: Sequence[str]

    @classmethod
    def of(cls, heading: str, values: Iterable[Number], form: str = "", missing: str = MISSING) -> Column:
        """Return the column of values in a format such as ".3g".

        >>> Column.of("loss", [0.25, None], ".2f").texts
        ('0.25', '–')
        """
        values = tuple(values)
        return cls(heading, values, tuple(missing if value is None else format(value, form) for value in values))
