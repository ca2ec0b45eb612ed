"""Where text comes from: a user's files, English of Debian packages, Python's own source, data sets of the hub."""

from __future__ import annotations

import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from einlinear.data.text.english import read_english
from einlinear.data.text.part import Part
from einlinear.data.text.streamed import HUB, SUFFIXES, stream

NAMES = ("english", "code", "openwebtext")
_BLOCK = 1 << 26  # characters of a file that are read at a time


def read_text(source: str) -> tuple[Part, ...]:
    """Find a text.

    Args:
        source: one of

            * "english": about 20 MB of clean English, from Debian packages that tools/fetch_english.sh fetches;
            * "code": the source of the standard library of this Python;
            * "openwebtext": streamed from the Hugging Face hub, as is any data set with a column `text` given as
              "hub:OWNER/NAME", or a local .parquet, .jsonl or .jsonl.gz file of such rows (the extra `text`);
            * a file of plain text in UTF-8, or a folder whose .txt files, also those in subfolders, are documents.

    Raises:
        ValueError: an unknown name, a folder without .txt files, or files that are damaged. Reading the documents
            raises it for a file that is not UTF-8.
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
    if path.name.endswith(SUFFIXES):
        return (stream(str(path)),)
    return (_files(path),)


def name_of(source: str) -> str:
    """A source by a name that is the same from any folder."""
    known = source in NAMES or source.startswith(HUB)
    return source if known else str(Path(source).expanduser().resolve())


def streams(source: str) -> bool:
    """Whether reading a source takes the datasets package."""
    return source == "openwebtext" or source.startswith(HUB) or source.endswith(SUFFIXES)


def _files(path: Path) -> Part:
    """A text file, or those of a folder."""
    files = [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*.txt") if file.is_file())
        files = sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
        if not files:
            raise ValueError(f"{path} has no .txt files, neither directly nor in subfolders")
    origin = f"{len(files)} text file{'s' if files[1:] else ''} at {path.resolve()}"
    size = sum(file.stat().st_size for file in files)
    return Part(str(path.resolve()), origin, size, lambda: (text for file in files for text in _read(file)))


def _read(path: Path) -> Iterator[str]:
    """The text of a file, in blocks of whole lines if it is large."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield "".join(file.readlines(_BLOCK))
            while lines := file.readlines(_BLOCK):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text (it has the byte 0x{byte:02x} where none may be); convert it, for example with "
            f"iconv --from-code=latin1 --to-code=utf-8"
        ) from None


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
