"""Rows of text, streamed from the Hugging Face hub by the datasets package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from einlinear_lab.data.text.part import Part

HUB = "hub:"
_OPENWEBTEXT = "Skylion007/openwebtext"


def stream(source: str) -> Part:
    """The rows of a data set.

    Args:
        source: "openwebtext" or "hub:OWNER/NAME".

    Raises:
        OSError: it is out of reach.
        ValueError: it has no column `text`.
    """
    name = _OPENWEBTEXT if source == "openwebtext" else source.removeprefix(HUB)
    if name.count("/") != 1:
        raise ValueError(f"{source!r} is no data set of the hub; write {HUB}OWNER/NAME")
    return Part(f"{HUB}{name}", f"the data set {name} of the Hugging Face hub", None, lambda: _rows(name))


def _rows(name: str) -> Iterator[str]:
    from datasets import load_dataset

    failures = (f"{name} cannot be read", "a local .parquet or .jsonl file with a column `text` does as well")
    rows: Iterator[dict[str, Any]]
    try:
        rows = iter(load_dataset(name, split="train", streaming=True))
    except Exception as error:  # of any of the libraries below it
        raise OSError(f"{failures[0]} ({error}); {failures[1]}") from error
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise OSError(f"{failures[0]} ({error}); {failures[1]}") from error
        if row is None:
            return
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{name} has a row without `text` (it has {', '.join(row)}); such a column is read")
        yield row["text"]
