"""Clean English prose, about 20 MB of it: three Debian packages that tools/fetch_english.sh fetches."""

from __future__ import annotations

import gzip
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

from einlinear.files import sha256_of
from einlinear_lab.data.paths import data_dir
from einlinear_lab.data.text.corpus import Corpus

_AGAIN = "run tools/fetch_english.sh (Debian, no root)"
# Elements that begin a new line, and those with an empty line before and after them.
_LINES = frozenset("br dd dt li td th tr".split())  # noqa: SIM905
_BLOCKS = frozenset("blockquote center div dl form h1 h2 h3 h4 h5 h6 hr ol p pre table ul".split())  # noqa: SIM905
_HIDDEN = frozenset({"head", "script", "style", "title"})


def read_english() -> tuple[Corpus, ...]:
    """Return essays, the Bible and a dictionary of computing.

    Raises:
        FileNotFoundError: the text was not fetched.
        ValueError: a file is missing or damaged.
    """
    root = data_dir() / "english"
    _check(root)
    pages = sorted((root / "anarchism").rglob("*.html"))
    verses, dictionary = root / "kjv.txt", root / "foldoc.dict.dz"
    faq = "An Anarchist FAQ, Debian package anarchism"
    bible = "the Bible, King James version, Debian package bible-kjv-text"
    foldoc = "the Free On-line Dictionary of Computing, Debian package dict-foldoc"
    return (
        Corpus("anarchism", faq, sum(page.stat().st_size for page in pages), lambda: map(_page, pages)),
        Corpus("bible", bible, verses.stat().st_size, lambda: iter([verses.read_text(encoding="utf-8")])),
        Corpus("dictionary", foldoc, 2 * dictionary.stat().st_size, lambda: iter([_unpacked(dictionary)])),
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


def _check(root: Path) -> None:
    """Compare the files with the checksums of the fetched ones."""
    sums = root / "SHA256SUMS"
    if not sums.is_file():
        raise FileNotFoundError(f"the English text is not in {root}: {_AGAIN}, or name a text of your own")
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        path = root / name.strip().lstrip("*")
        if not path.is_file() or sha256_of(path) != digest:
            problem = "damaged" if path.is_file() else "missing"
            raise ValueError(f"{path} is {problem}: delete {root} and {_AGAIN}")


def _unpacked(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and {_AGAIN}") from error
