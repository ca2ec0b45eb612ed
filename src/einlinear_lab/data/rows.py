"""Text in files: plain text, and rows of JSON, JSON Lines, CSV or Parquet. All but Parquet may be gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any

# Formats by the ending of a file name without .gz. Any other file is plain text.
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_GZIP = ".gz"
# Byte order marks, which editors and shells of Windows write.
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_CELL = 1 << 30
# Values of JSON other than objects and numbers.
_KINDS: dict[type, str] = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
_BINARY = {
    b"PK\x03\x04": "a ZIP archive, as .docx, .xlsx and .epub files are",
    b"%PDF": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x1f\x8b": "compressed by gzip; its name must end in .gz",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file; its name must end in .parquet",
}


class NotText(ValueError):
    """A file whose bytes are not text in UTF-8."""


def format_of(path: Path) -> str | None:
    """Return the format of the rows of a file: "jsonl", "json", "csv" or "parquet"; None for plain text.

    >>> [format_of(Path(name)) for name in ("a.jsonl", "A.CSV.gz", "a.txt", "a.txt.gz")]
    ['jsonl', 'csv', None, None]
    """
    return FORMATS.get(_ending(path))


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(_GZIP)).suffix


def binary_kind(path: Path) -> str | None:
    """Return the kind of a file that is not text, such as "a PDF document"; None for text."""
    with _damage(path), _opened(path) as file:
        start = file.read(8192)
    for magic, kind in _BINARY.items():
        if start.startswith(magic):
            return kind
    return "a binary file (it holds NUL bytes)" if b"\0" in start and not start.startswith(_UTF_16) else None


@contextmanager
def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> Iterator[IO[str]]:
    """Open a file as text, decompressed: UTF-8, or UTF-16 if it begins with that mark; marks are left out."""
    with _damage(path), _opened(path) as raw:
        encoding = "utf-16" if raw.peek(2)[:2] in _UTF_16 else "utf-8-sig"
        with TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline) as file:
            yield file


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file, each with its place, such as "line 3 of chat.jsonl"."""
    readers = {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}
    for place, row in readers[format_of(path) or "jsonl"](path):
        where = f"{place} of {path}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {_KINDS.get(type(row), 'a number')}, not an object of named values")
        yield where, row


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"line {number} of {path}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a list, a single object, or one object per line."""
    with open_text(path) as file:
        text = file.read()
    try:
        content = _parsed(text, str(path))
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        yield from _json_lines(path)
    else:
        rows = content if isinstance(content, list) else [content]
        yield from ((f"item {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if _ending(path) == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    columns = len(reader.fieldnames or ())
                    raise ValueError(f"{where} of {path} has more cells than the {columns} columns")
                yield where, row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path} is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs a package: pip install pyarrow", name="pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    # The base class of the errors of pyarrow.
    except ValueError as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file, such as a pipe; write its content into one")
    return gzip.open(path, "rb") if path.name.lower().endswith(_GZIP) else path.open("rb")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn errors of reading into errors that name the file and a remedy."""
    try:
        yield
    except UnicodeDecodeError as error:
        if kind := binary_kind(path):
            raise NotText(f"{path} is not text but {kind}; save its content as UTF-8 text") from None
        byte = error.object[error.start]
        raise NotText(
            f"{path} is not UTF-8 text (it has the byte 0x{byte:02x} where none may be); convert it, for example with "
            f"iconv --from-code=latin1 --to-code=utf-8"
        ) from None
    except UnicodeError as error:
        raise NotText(f"{path} is not text of its encoding: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not compressed by gzip, as its name says: {error}") from None
