"""A prepared text on disk: memory-mapped tokens, and tokens.json, which describes them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from einlinear.files import sha256_of, write_text
from einlinear_lab.data.text.tokenizer import (
    CHARACTERS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    dtype_of,
)

# Of the files; raised when an older program could misread them.
FORMAT = 1
DESCRIPTION = "tokens.json"
TOKENIZER = "tokenizer.json"
TRAIN, VALIDATION = "train.bin", "validation.bin"
CHECKED = ".checked.json"
# The ending of files that are being written.
UNFINISHED = ".part"
_AGAIN = "Prepare the text again: einlinear prepare with --fresh"


@dataclass
class CorpusCounts:
    """Numbers of documents, characters and tokens of one corpus.

    Attributes:
        name, origin: as of `Corpus`.
        documents: read.
        documents_dropped: empty, or with too many characters that the tokenizer does not have.
        characters: of the prepared text.
        characters_replaced: of the prepared text, which stand for others.
        characters_dropped: left out, with all of the dropped documents.
        train_tokens, validation_tokens: of each split.
        fallback: the reason why tokens="auto" became bytes; else empty.
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
        folder: of its files.
        tokenizer: that encoded it.
        train, validation: (tokens,) of uint8 for up to 256 tokens, else uint16; read from disk as they are used.
        counts: of each corpus.
        config: the `TextConfig` it was prepared with, as JSON values by name.
        sha256: of train.bin and validation.bin together, which identifies the data.
    """

    folder: Path
    tokenizer: Tokenizer
    train: npt.NDArray[Any]
    validation: npt.NDArray[Any]
    counts: tuple[CorpusCounts, ...]
    config: dict[str, Any]
    sha256: str


def load_tokens(folder: str | Path) -> Tokens:
    """Open a prepared text.

    The sizes of its files are checked every time. Their SHA-256 is computed when they are opened for the first time,
    and again only when a file has changed since then; .checked.json beside them notes which files were checked.

    Args:
        folder: as for `einlinear prepare --out`.

    Raises:
        ValueError: no prepared text, one of another format, or a file that is missing, truncated or changed.
        FileNotFoundError: no such folder.
    """
    folder = Path(folder).expanduser()
    content = _read_description(folder)
    try:
        vocab_size, kind = int(content["tokenizer"]["vocab_size"]), str(content["tokenizer"]["kind"])
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        counts = tuple(CorpusCounts(**one) for one in content["counts"])
        config = dict(content["config"])
        if files.keys() != {TRAIN, VALIDATION} | ({TOKENIZER} if kind == BPETokenizer.kind else set()):
            raise KeyError(f"files {', '.join(files)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(_damaged(folder / DESCRIPTION, repr(error))) from None

    _check_files(folder, files)
    tokenizer = _read_tokenizer(folder, kind, content["tokenizer"])
    if tokenizer.vocab_size != vocab_size:
        reason = f"vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size}"
        raise ValueError(_damaged(folder / DESCRIPTION, reason))
    train, validation = (
        np.asarray(np.memmap(folder / name, dtype_of(vocab_size), "r")) for name in (TRAIN, VALIDATION)
    )
    sha256 = hashlib.sha256("".join(files[name][1] for name in (TRAIN, VALIDATION)).encode()).hexdigest()
    return Tokens(folder, tokenizer, train, validation, counts, config, sha256)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer as in tokens.json."""
    content = {BPETokenizer.kind: {"file": TOKENIZER}, CharTokenizer.kind: {"characters": CHARACTERS}}
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size} | content.get(tokenizer.kind, {})


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.exists():
        example = f"for example with einlinear prepare english --out {folder}"
        raise FileNotFoundError(
            f"{folder} does not exist; name a folder that einlinear prepare wrote, or write it, {example}"
        )
    if not folder.is_dir():
        first = f"write it first: einlinear prepare {folder} --out FOLDER"
        raise ValueError(f"{folder} is a file; name the folder that einlinear prepare wrote, or {first}")
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


def _read_tokenizer(folder: Path, kind: str, content: dict[str, Any]) -> Tokenizer:
    if kind == CharTokenizer.kind:
        if content.get("characters") != CHARACTERS:
            raise ValueError(_damaged(folder / DESCRIPTION, "other characters than this version's"))
        return CharTokenizer()
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind == BPETokenizer.kind:
        try:
            return BPETokenizer((folder / TOKENIZER).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(_damaged(folder / TOKENIZER, str(error))) from None
    raise ValueError(_damaged(folder / DESCRIPTION, f"tokenizer of kind {kind!r}, expected char, bytes or bpe"))


def _check_files(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    """Compare the sizes, and the checksums unless the file system reports no change since they were compared."""
    now = {}
    for name, (expected, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, {expected:,} bytes are expected. {_AGAIN}")
        status = path.stat()
        if (size := status.st_size) != expected:
            problem = "truncated" if size < expected else "another file, or appended to"
            raise ValueError(f"{path} holds {size:,} bytes, expected {expected:,}: it is {problem}. {_AGAIN}")
        # Programs cannot set the time of a change of the status.
        now[name] = [status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns, digest]
    with suppress(OSError, ValueError):
        if json.loads((folder / CHECKED).read_text(encoding="utf-8")) == now:
            return
    for name, (_, digest) in files.items():
        if (actual := sha256_of(folder / name)) != digest:
            sums = f"the SHA-256 {actual[:16]}…, expected {digest[:16]}…"
            raise ValueError(f"{folder / name} has {sums}: its content has changed since it was prepared. {_AGAIN}")
    # A folder that cannot be written is checked each time.
    with suppress(OSError):
        write_text(folder / CHECKED, json.dumps(now))


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}). {_AGAIN}"
