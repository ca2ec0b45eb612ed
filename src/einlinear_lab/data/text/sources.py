"""Sources of text: files, English of Debian packages, the source of Python, data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from einlinear.files import sha256_of
from einlinear_lab.data.paths import data_dir
from einlinear_lab.data.rows import format_of, open_text, read_rows

HUB = "hub:"
NAMES = ("english", "code", "openwebtext")
_OPENWEBTEXT = "Skylion007/openwebtext"
# Characters of a file that are read at a time.
_BLOCK = 1 << 26
_AGAIN = "run tools/fetch_english.sh (Debian, no root)"
# Elements of HTML that begin a new line, and those with an empty line before and after them.
_LINES = frozenset("br dd dt li td th tr".split())  # noqa: SIM905
_BLOCKS = frozenset("blockquote center div dl form h1 h2 h3 h4 h5 h6 hr ol p pre table ul".split())  # noqa: SIM905
_HIDDEN = frozenset({"head", "script", "style", "title"})


@dataclass(frozen=True)
class Corpus:
    """A collection of documents, which gives its own share to validation.

    Attributes:
        size: approximate number of characters, None if unknown.
        documents: returns the documents, always in the same order; raises `NotText` where a file is not UTF-8.
        raw: the same with such bytes as `open(..., errors="surrogateescape")` returns them; None if there are none.
    """

    name: str
    origin: str
    size: int | None
    documents: Callable[[], Iterator[str]]
    raw: Callable[[], Iterator[str]] | None = None


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
        return (Corpus(f"{HUB}{name}", origin, None, lambda: _texts(_hub_rows(name))),)
    path = Path(source).expanduser()
    if not source or not path.exists():
        allowed = f"give one of {', '.join(NAMES)}, {HUB}OWNER/NAME, a text file or a folder of .txt files"
        if path.name != source or path.suffix:
            raise FileNotFoundError(f"{path} does not exist; {allowed}")
        raise ValueError(f"unknown text {source!r}; {allowed}")
    if path.is_file() and format_of(path):
        file = path.resolve()
        return (Corpus(str(file), f"the rows of {file}", _size(file), lambda: _texts(read_rows(file))),)
    return (_files(path),)


def name_of(source: str) -> str:
    """Return the name of a source, which is the same from any working directory."""
    is_name = source in NAMES or source.startswith(HUB)
    return source if is_name else str(Path(source).expanduser().resolve())


def _texts(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    for where, row in rows:
        text = row.get("text")
        if not isinstance(text, str):
            problem = f"`text` is {type(text).__name__}" if "text" in row else f"it has {', '.join(map(str, row))}"
            raise ValueError(f"{where} has no column `text` with a text ({problem}); such a column is read")
        # A lone surrogate, as JSON may have it, is no character.
        yield text if text.isascii() else text.encode("utf-8", "replace").decode()


def _hub_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    try:
        for row in load_dataset(name, split="train", streaming=True):
            yield f"a row of {name}", row
    # The libraries below may raise anything.
    except Exception as error:
        hint = "a local .parquet or .jsonl file with a column `text` does as well"
        raise OSError(f"{name} cannot be read ({error}); {hint}") from error


def _files(path: Path) -> Corpus:
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
    return Corpus("code", origin, sum(map(_size, files)), lambda: map(_python, files))


def _python(path: Path) -> str:
    try:
        # In the encoding that the file declares.
        with tokenize.open(path) as file:
            return file.read()
    # Some of Python's tests are wrong on purpose.
    except (SyntaxError, UnicodeDecodeError):
        return ""


def read_english() -> tuple[Corpus, ...]:
    """Return about 20 MB of clean English: essays, the Bible and a dictionary of computing, from Debian packages."""
    root = data_dir() / "english"
    sums = root / "SHA256SUMS"
    if not sums.is_file():
        raise FileNotFoundError(f"the English text is not in {root}: {_AGAIN}, or name a text of your own")
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        path = root / name.strip().lstrip("*")
        if not path.is_file() or sha256_of(path) != digest:
            problem = "damaged" if path.is_file() else "missing"
            raise ValueError(f"{path} is {problem}: delete {root} and {_AGAIN}")
    pages = sorted((root / "anarchism").rglob("*.html"))
    verses, dictionary = root / "kjv.txt", root / "foldoc.dict.dz"
    faq = "An Anarchist FAQ, Debian package anarchism"
    bible = "the Bible, King James version, Debian package bible-kjv-text"
    foldoc = "the Free On-line Dictionary of Computing, Debian package dict-foldoc"

    def entries() -> Iterator[str]:
        yield gzip.decompress(dictionary.read_bytes()).decode("utf-8", "replace")

    return (
        Corpus("anarchism", faq, sum(map(_size, pages)), lambda: map(_page, pages)),
        Corpus("bible", bible, _size(verses), lambda: iter([verses.read_text(encoding="utf-8")])),
        Corpus("dictionary", foldoc, 2 * _size(dictionary), entries),
    )


def _page(path: Path) -> str:
    return page_text(path.read_text(encoding="utf-8", errors="replace"))


def page_text(html: str) -> str:
    """Return the text of a page without its markup, with an empty line between blocks."""
    parser = _PageText()
    parser.feed(html)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


class _PageText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag not in ("br", "hr"):
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _break(self, tag: str) -> None:
        if not self._hidden and tag in _LINES | _BLOCKS:
            self.pieces.append("\n" if tag in _LINES else "\n\n")
