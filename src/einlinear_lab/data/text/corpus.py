"""`Corpus`: what every source of text returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """A collection of documents, which gives its own share to validation.

    Attributes:
        name: of the corpus; the full path of a file or folder.
        origin: one sentence on where the documents came from.
        size: approximate number of characters, None if unknown.
        documents: returns the documents from the first one, at every call the same ones in the same order. A document
            that could not be read as text is empty. `NotText` where the bytes of a file are not UTF-8.
        raw: the same with bytes that are not UTF-8 as `open(..., errors="surrogateescape")` returns them; None if there
            are no such bytes.
    """

    name: str
    origin: str
    size: int | None
    documents: Callable[[], Iterator[str]]
    raw: Callable[[], Iterator[str]] | None = None
