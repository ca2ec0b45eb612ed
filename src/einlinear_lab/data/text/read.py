"""Where text comes from: a user's files, English of Debian packages, Python's own source, data sets of the hub."""

from __future__ import annotations

import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from einlinear_lab.data.rows import format_of, open_text, read_rows
from einlinear_lab.data.text.english import read_english
from einlinear_lab.data.text.part import Part
from einlinear_lab.data.text.streamed import HUB, stream

NAMES = ("english", "code", "openwebtext")
_BLOCK = 1 << 26  # characters of a file that are read at a time


def read_text(source: str) -> tuple[Part, ...]:
    """Find a text.

    Args:
        source: one of

            * "english": about 20 MB of clean English, from Debian packages that tools/fetch_english.sh fetches;
            * "code": the source of the standard library of this Python;
            * "openwebtext": streamed from the Hugging Face hub, as is any data set with a column `text` given as
              "hub:OWNER/NAME" (the extra `text`);
            * a .jsonl, .json, .csv, .tsv or .parquet file with a column `text`, whose rows are documents;
            * any other file: plain text in UTF-8;
            * a folder whose .txt files, also those in subfolders, are documents.

            All but .parquet may be compressed, with .gz at the end of the name.

    Raises:
        ValueError: an unknown name, a folder without .txt files, or files that are damaged. Reading the documents
            raises it for a row without `text`, and `NotText` for a file that is not UTF-8.
        FileNotFoundError: the file or folder does not exist, or the English text was not fetched.
        OSError: a data set of the hub is out of reach.
    """
    if source == "english":
        return read_english()
    if source == "code":
        return (_code(),)
    if source == "openwebtext" or source.startswith(HUB):
        return (stream(source),)
    path = Path(source).expanduser()
    if not source or not path.exists():
        known = f"give one of {', '.join(NAMES)}, {HUB}OWNER/NAME, a text file or a folder of .txt files"
        if path.name != source or path.suffix:
            raise FileNotFoundError(f"{path} does not exist; {known}")
        raise ValueError(f"unknown text {source!r}; {known}")
    if path.is_file() and format_of(path):
        found = path.resolve()
        return (Part(str(found), f"the rows of {found}", _size(found), lambda: _texts(found)),)
    return (_files(path),)


def name_of(source: str) -> str:
    """A source by a name that is the same from any folder."""
    known = source in NAMES or source.startswith(HUB)
    return source if known else str(Path(source).expanduser().resolve())


def streams(source: str) -> bool:
    """Whether reading a source takes the datasets package."""
    return source == "openwebtext" or source.startswith(HUB)


def _texts(path: Path) -> Iterator[str]:
    """The column `text` of rows."""
    for where, row in read_rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            what = f"`text` is {type(text).__name__}" if "text" in row else f"it has {', '.join(map(str, row))}"
            raise ValueError(f"{where} has no column `text` with a text ({what}); such a column is read")
        # A lone half of a character, as JSON may have it, is no character.
        yield text if text.isascii() else text.encode("utf-8", "replace").decode()


def _files(path: Path) -> Part:
    """A text file, or those of a folder."""
    files = [path]
    if path.is_dir():
        inside = (file for ending in ("*.txt", "*.txt.gz") for file in path.rglob(ending) if file.is_file())
        files = sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
        if not files:
            others = sorted({file.suffix for file in path.rglob("*") if file.is_file() and file.suffix})
            has = f" (it has {', '.join(others[:5])}; name such a file itself)" if others else ""
            raise ValueError(f"{path} has no .txt files, neither directly nor in subfolders{has}")
    origin = f"{len(files)} text file{'s' if files[1:] else ''} at {path.resolve()}"

    def documents(errors: str) -> Iterator[str]:
        return (text for file in files for text in _read(file, errors))

    size = sum(map(_size, files))
    return Part(str(path.resolve()), origin, size, partial(documents, "strict"), partial(documents, "surrogateescape"))


def _size(path: Path) -> int:
    """About how many characters a file has."""
    return path.stat().st_size * (3 if path.name.lower().endswith(".gz") else 1)


def _read(path: Path, errors: str) -> Iterator[str]:
    """The text of a file, in blocks of whole lines if it is large."""
    with open_text(path, errors) as file:
        yield "".join(file.readlines(_BLOCK))
        while lines := file.readlines(_BLOCK):
            yield "".join(lines)


def _code() -> Part:
    """The .py files of the standard library, its tests among them, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - {"site-packages", "dist-packages"})  # what is left of it is walked
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise ValueError(f"this Python has no source of its standard library at {root}; name another text")
    version = ".".join(map(str, sys.version_info[:3]))
    origin = f"the standard library of Python {version}: {len(files):,} files in {root}"
    return Part("code", origin, sum(file.stat().st_size for file in files), lambda: map(_python, files))


def _python(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # in the encoding that it declares
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # tests of Python's, wrong on purpose
        return ""
