"""Sources of text: files, English of Debian packages, the source of Python, data sets of the Hugging Face hub."""

from __future__ import annotations

import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from einlinear_lab.data.rows import format_of, open_text, read_rows
from einlinear_lab.data.text.corpus import Corpus
from einlinear_lab.data.text.english import read_english

HUB = "hub:"
NAMES = ("english", "code", "openwebtext")
_OPENWEBTEXT = "Skylion007/openwebtext"
# Characters of a file that are read at a time.
_BLOCK = 1 << 26


def read_text(source: str) -> tuple[Corpus, ...]:
    """Return the corpora of a source.

    Args:
        source: one of

            * "english": about 20 MB of clean English, from Debian packages that tools/fetch_english.sh fetches;
            * "code": the source of the standard library of this Python;
            * "openwebtext": streamed from the Hugging Face hub, as is any data set with a column `text` given as
              "hub:OWNER/NAME";
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
        name = _OPENWEBTEXT if source == "openwebtext" else source.removeprefix(HUB)
        if name.count("/") != 1:
            raise ValueError(f"{source!r} is no data set of the hub; write {HUB}OWNER/NAME")
        origin = f"the data set {name} of the Hugging Face hub"
        return (Corpus(f"{HUB}{name}", origin, None, lambda: _hub_texts(name)),)
    path = Path(source).expanduser()
    if not source or not path.exists():
        allowed = f"give one of {', '.join(NAMES)}, {HUB}OWNER/NAME, a text file or a folder of .txt files"
        if path.name != source or path.suffix:
            raise FileNotFoundError(f"{path} does not exist; {allowed}")
        raise ValueError(f"unknown text {source!r}; {allowed}")
    if path.is_file() and format_of(path):
        file = path.resolve()
        return (Corpus(str(file), f"the rows of {file}", _size(file), lambda: _texts(file)),)
    return (_files(path),)


def name_of(source: str) -> str:
    """Return the name of a source, which is the same from any working directory."""
    is_name = source in NAMES or source.startswith(HUB)
    return source if is_name else str(Path(source).expanduser().resolve())


def _texts(path: Path) -> Iterator[str]:
    """Yield the column `text` of rows."""
    for where, row in read_rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            problem = f"`text` is {type(text).__name__}" if "text" in row else f"it has {', '.join(map(str, row))}"
            raise ValueError(f"{where} has no column `text` with a text ({problem}); such a column is read")
        # A lone surrogate, as JSON may have it, is no character.
        yield text if text.isascii() else text.encode("utf-8", "replace").decode()


def _files(path: Path) -> Corpus:
    """Return the corpus of a text file, or of those of a folder."""
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

    strict, raw = (partial(documents, errors) for errors in ("strict", "surrogateescape"))
    return Corpus(str(path.resolve()), origin, sum(map(_size, files)), strict, raw)


def _size(path: Path) -> int:
    """Return the approximate number of characters of a file."""
    return path.stat().st_size * (3 if path.name.lower().endswith(".gz") else 1)


def _read(path: Path, errors: str) -> Iterator[str]:
    """Yield the text of a file, in blocks of lines if it is large."""
    with open_text(path, errors) as file:
        yield "".join(file.readlines(_BLOCK))
        while lines := file.readlines(_BLOCK):
            yield "".join(lines)


def _code() -> Corpus:
    """Return the .py files of the standard library with its tests, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        # os.walk visits what is left of this list.
        inner[:] = sorted(set(inner) - {"site-packages", "dist-packages"})
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise ValueError(f"this Python has no source of its standard library at {root}; name another text")
    version = ".".join(map(str, sys.version_info[:3]))
    origin = f"the standard library of Python {version}: {len(files):,} files in {root}"
    return Corpus("code", origin, sum(file.stat().st_size for file in files), lambda: map(_python, files))


def _python(path: Path) -> str:
    try:
        # In the encoding that the file declares.
        with tokenize.open(path) as file:
            return file.read()
    # Some of Python's tests are wrong on purpose.
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _hub_texts(name: str) -> Iterator[str]:
    from datasets import load_dataset

    rows: Iterator[dict[str, Any]] | None = None
    while True:
        try:
            rows = iter(load_dataset(name, split="train", streaming=True)) if rows is None else rows
            row = next(rows, None)
        # The libraries below may raise anything.
        except Exception as error:
            hint = "a local .parquet or .jsonl file with a column `text` does as well"
            raise OSError(f"{name} cannot be read ({error}); {hint}") from error
        if row is None:
            return
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{name} has a row without `text` (it has {', '.join(row)}); such a column is read")
        yield row["text"]
