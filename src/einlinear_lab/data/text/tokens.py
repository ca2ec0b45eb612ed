"""A prepared text on disk: its tokens, mapped into memory, and tokens.json, which says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from einlinear.files import sha256_of, write_text
from einlinear_lab.data.text.encode import CHARACTERS, BytePairs, Bytes, Characters, Vocabulary, dtype_of

FORMAT = 1  # of the files; raised when an older program could misread them
DESCRIPTION = "tokens.json"
TOKENIZER = "tokenizer.json"
TRAIN, VALIDATION = "train.bin", "validation.bin"
CHECKED = ".checked.json"
UNFINISHED = ".part"  # ending of files that are being written


@dataclass
class Counts:
    """What became of one part of the text.

    Attributes:
        name, origin: which it is, and one sentence that says where it came from.
        documents: how many were read.
        documents_dropped: those of them that are empty, or that the vocabulary cannot express.
        characters: of the prepared text.
        characters_replaced: those of them that stand for others.
        characters_dropped: left out, with all of the dropped documents.
        train_tokens, validation_tokens: of each split.
        fallback: why the tokens are bytes, where it was left to the text whether they are; else empty.
    """

    name: str
    origin: str
    documents: int = 0
    documents_dropped: int = 0
    characters: int = 0
    characters_replaced: int = 0
    characters_dropped: int = 0
    train_tokens: int = 0
    validation_tokens: int = 0
    fallback: str = ""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prepared text.

    Attributes:
        folder: where it is.
        vocabulary: what its tokens mean.
        train, validation: (tokens,) of uint8 for up to 256 tokens, else uint16; read from disk as they are used.
        counts: what became of each part of the text.
        recipe: what it was prepared from, and how; JSON values by name.
        sha256: of train.bin and validation.bin together: the identity of the data.
    """

    folder: Path
    vocabulary: Vocabulary
    train: npt.NDArray[Any]
    validation: npt.NDArray[Any]
    counts: tuple[Counts, ...]
    recipe: dict[str, Any]
    sha256: str


def load_tokens(folder: str | Path) -> Tokens:
    """Open a prepared text.

    The sizes of its files are checked every time. Their SHA-256 is computed when they are opened for the first time,
    and again only when a file has changed since: what was checked is noted in .checked.json, beside them.

    Args:
        folder: what `einlinear prepare --out` wrote.

    Raises:
        ValueError: no prepared text, one of another format, or a file that is missing, truncated or changed.
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder).expanduser()
    content = _read_description(folder)
    try:
        vocabulary_content: dict[str, Any] = content["vocabulary"]
        files: dict[str, dict[str, Any]] = content["files"]
        expected = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        size, kind = int(vocabulary_content["size"]), str(vocabulary_content["kind"])
        counts = tuple(Counts(**part) for part in content["counts"])
        recipe = dict(content["recipe"])
        if expected.keys() != {TRAIN, VALIDATION} | ({TOKENIZER} if kind == BytePairs.kind else set()):
            raise KeyError(f"files {', '.join(expected)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(_damaged(folder / DESCRIPTION, repr(error))) from None

    for name, (count, _) in expected.items():
        _check_size(folder / name, count)
    _check_sums(folder, expected)
    vocabulary = _read_vocabulary(folder, kind, vocabulary_content)
    if vocabulary.size != size:
        raise ValueError(_damaged(folder / DESCRIPTION, f"a vocabulary of {size}, but its own has {vocabulary.size}"))
    train, validation = (np.asarray(np.memmap(folder / name, dtype_of(size), "r")) for name in (TRAIN, VALIDATION))
    together = hashlib.sha256("".join(expected[name][1] for name in (TRAIN, VALIDATION)).encode()).hexdigest()
    return Tokens(folder, vocabulary, train, validation, counts, recipe, together)


def describe(vocabulary: Vocabulary) -> dict[str, Any]:
    """A vocabulary, as tokens.json says it."""
    how = {BytePairs.kind: {"file": TOKENIZER}, Characters.kind: {"characters": CHARACTERS}}.get(vocabulary.kind, {})
    return {"kind": vocabulary.kind, "size": vocabulary.size} | how


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist; name a folder that einlinear prepare wrote, or write it, for example with "
            f"einlinear prepare english --out {folder}"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file; name the folder that einlinear prepare wrote, or write it first: "
            f"einlinear prepare {folder} --out FOLDER"
        )
    if not path.exists():
        if list(folder.glob(f"*{UNFINISHED}")):
            raise ValueError(f"{folder} holds an unfinished preparation; run the same einlinear prepare again")
        raise ValueError(f"{folder} holds no prepared text ({path} is missing); name a folder of einlinear prepare")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(path, str(error))) from None
    if not isinstance(content, dict) or not {"format", "einlinear"} <= content.keys():
        raise ValueError(f"{path} is not of einlinear (it has no format); name a folder of einlinear prepare")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder} was prepared by einlinear {content['einlinear']} in format {content['format']}, but this one "
            f"reads format {FORMAT}. Prepare the text again into another folder, or use that version"
        )
    return content


def _read_vocabulary(folder: Path, kind: str, content: dict[str, Any]) -> Vocabulary:
    if kind == Characters.kind:
        if content.get("characters") != CHARACTERS:
            raise ValueError(_damaged(folder / DESCRIPTION, "other characters than this version's"))
        return Characters()
    if kind == Bytes.kind:
        return Bytes()
    if kind == BytePairs.kind:
        try:
            return BytePairs((folder / TOKENIZER).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(_damaged(folder / TOKENIZER, str(error))) from None
    raise ValueError(_damaged(folder / DESCRIPTION, f"vocabulary of kind {kind!r}, expected char, bytes or bpe"))


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, {expected:,} bytes are expected. {_AGAIN}")
    found = path.stat().st_size
    if found != expected:
        what = "truncated" if found < expected else "another file, or appended to"
        raise ValueError(f"{path} holds {found:,} bytes, expected {expected:,}: it is {what}. {_AGAIN}")


def _check_sums(folder: Path, expected: dict[str, tuple[int, str]]) -> None:
    """Compare the checksums, unless they were compared before and the files are still the same to the file system."""
    now = {name: [*_state(folder / name), digest] for name, (_, digest) in expected.items()}
    if _noted(folder) == now:
        return
    for name, (_, digest) in expected.items():
        found = sha256_of(folder / name)
        if found != digest:
            raise ValueError(
                f"{folder / name} has the SHA-256 {found[:16]}…, expected {digest[:16]}…: its content has changed "
                f"since it was prepared. {_AGAIN}"
            )
    with suppress(OSError):  # a folder that cannot be written is checked each time
        write_text(folder / CHECKED, json.dumps(now))


def _noted(folder: Path) -> object:
    try:
        return json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _state(path: Path) -> Iterable[int]:
    """What changes with a file's content: the last of these, the time of its change, cannot be set by programs."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}). {_AGAIN}"


_AGAIN = "Prepare the text again: einlinear prepare with --fresh"
