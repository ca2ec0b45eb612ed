"""What every source of text gives: `Part`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of a text, which gives its own share to validation.

    Attributes:
        name: which it is; the full path of a file or folder.
        origin: one sentence that says where it came from.
        size: about how many characters it has, None if that is not known.
        documents: gives its documents from the first one, at every call the same ones in the same order. A document
            that could not be read as text is empty. `NotText` where the bytes of a file are not UTF-8.
        raw: the same, but for bytes that are not UTF-8, which are as `open(..., errors="surrogateescape")` gives them;
            None if there are none.
    """

    name: str
    origin: str
    size: int | None
    documents: Callable[[], Iterator[str]]
    raw: Callable[[], Iterator[str]] | None = None
