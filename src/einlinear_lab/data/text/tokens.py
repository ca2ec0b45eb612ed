"""A prepared text on disk: memory-mapped tokens, and tokens.json, which describes them and is written last."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from einlinear.files import lock, sha256_of, write_text
from einlinear.version import __version__
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
# In the order in which they get their names.
_NAMES = (TRAIN, VALIDATION, TOKENIZER, DESCRIPTION)
CHECKED = ".checked.json"
_LOCK = ".lock"
# The ending of files that are being written.
UNFINISHED = ".part"
_AGAIN = "Prepare the text again: einlinear prepare with --fresh"


@dataclass
class CorpusCounts:
    """Numbers of documents, characters and tokens of one corpus.

    Attributes:
        documents_dropped: empty, or with too many characters that the tokenizer does not have.
        characters: of the prepared text.
        characters_replaced: of the prepared text, which stand for others.
        characters_dropped: left out, with all of the dropped documents.
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

    The sizes of its files are checked every time. Their SHA-256 is computed only when a file has changed since the last
    check, which .checked.json beside them notes.

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
        raise _damaged(folder / DESCRIPTION, repr(error)) from None

    _check_files(folder, files)
    tokenizer = _read_tokenizer(folder, kind, content["tokenizer"])
    if tokenizer.vocab_size != vocab_size:
        reason = f"vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size}"
        raise _damaged(folder / DESCRIPTION, reason)
    splits = (np.memmap(folder / name, dtype_of(vocab_size), "r") for name in (TRAIN, VALIDATION))
    train, validation = map(np.asarray, splits)
    sha256 = hashlib.sha256("".join(files[name][1] for name in (TRAIN, VALIDATION)).encode()).hexdigest()
    return Tokens(folder, tokenizer, train, validation, counts, config, sha256)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not folder.exists():
        write = f"write it, for example with einlinear prepare english --out {folder}"
        raise FileNotFoundError(f"{folder} does not exist; name a folder that einlinear prepare wrote, or {write}")
    if not folder.is_dir():
        write = f"write it first: einlinear prepare {folder} --out FOLDER"
        raise ValueError(f"{folder} is a file; name the folder that einlinear prepare wrote, or {write}")
    if not path.exists():
        if list(folder.glob(f"*{UNFINISHED}")):
            raise ValueError(f"{folder} holds an unfinished preparation; run the same einlinear prepare again")
        raise ValueError(f"{folder} holds no prepared text ({path} is missing); name a folder of einlinear prepare")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, dict) or not {"format", "einlinear"} <= content.keys():
        raise ValueError(f"{path} is not of einlinear (it has no format); name a folder of einlinear prepare")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder} was prepared by einlinear {content['einlinear']} in format {content['format']}, but this one "
            f"reads format {FORMAT}. Prepare the text again into another folder, or use that version"
        )
    return content


def _read_tokenizer(folder: Path, kind: str, content: dict[str, Any]) -> Tokenizer:
    if kind == BPETokenizer.kind:
        try:
            return BPETokenizer((folder / TOKENIZER).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise _damaged(folder / TOKENIZER, str(error)) from None
    if kind == CharTokenizer.kind and content.get("characters") != CHARACTERS:
        raise _damaged(folder / DESCRIPTION, "other characters than this version's")
    if kind not in (CharTokenizer.kind, ByteTokenizer.kind):
        raise _damaged(folder / DESCRIPTION, f"tokenizer of kind {kind!r}, expected char, bytes or bpe")
    return CharTokenizer() if kind == CharTokenizer.kind else ByteTokenizer()


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


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). {_AGAIN}")


class TokenWriter:
    """Writes tokens into a folder atomically, in a `with` statement.

    All files have temporary names until `finish`, and a text that was in the folder stays until then. Nothing is forced
    onto the disk: after a power failure, `load_tokens` reports the damage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._created = not folder.exists()
        if not self._created:
            _check_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._finished = False
        self._lock = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in (TRAIN, VALIDATION)}

    def __enter__(self) -> TokenWriter:
        busy = f"another process is preparing a text in {self.folder}; wait for it, or end it"
        self._lock.enter_context(lock(self.folder / _LOCK, busy))
        self._files = {name: self._temporary(name).open("wb") for name in (TRAIN, VALIDATION)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if not self._finished:
            for name in _NAMES:
                self._temporary(name).unlink(missing_ok=True)
        # Windows removes the file when the lock is released.
        with suppress(OSError):
            (self.folder / _LOCK).unlink()
        self._lock.close()
        if self._created and not self._finished:
            # Others may have put files into it.
            with suppress(OSError):
                self.folder.rmdir()

    def add(self, name: str, tokens: npt.NDArray[Any]) -> None:
        """Append tokens to train.bin or validation.bin."""
        self._files[name].write(tokens.data)
        self._digests[name].update(tokens.data)

    def finish(self, tokenizer: Tokenizer, counts: list[CorpusCounts], config: dict[str, Any]) -> None:
        """Write tokenizer.json and tokens.json, and rename all files."""
        files: dict[str, dict[str, Any]] = {}
        for name, file in self._files.items():
            files[name] = {"bytes": file.tell(), "sha256": self._digests[name].hexdigest()}
            file.close()
        described: dict[str, Any] = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
        if isinstance(tokenizer, BPETokenizer):
            described["file"] = TOKENIZER
            content = tokenizer.content.encode()
            files[TOKENIZER] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self._temporary(TOKENIZER).write_bytes(content)
        elif isinstance(tokenizer, CharTokenizer):
            described["characters"] = CHARACTERS
        description = {
            "format": FORMAT,
            "einlinear": __version__,
            "tokenizer": described,
            "dtype": "uint8" if tokenizer.end.itemsize == 1 else "uint16, little-endian",
            "files": files,
            "counts": [asdict(one) for one in counts],
            "config": config,
        }
        self._temporary(DESCRIPTION).write_bytes((json.dumps(description, indent=2, allow_nan=False) + "\n").encode())
        # The text that was in the folder before.
        for name in (DESCRIPTION, CHECKED, TOKENIZER):
            (self.folder / name).unlink(missing_ok=True)
        for name in (*files, DESCRIPTION):
            os.replace(self._temporary(name), self.folder / name)
        self._finished = True

    def _temporary(self, name: str) -> Path:
        return self.folder / (name + UNFINISHED)


def _check_foreign(folder: Path) -> None:
    """Raise ValueError for a folder with files that may not be those of a prepared text."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the tokens")
    names = {path.name for path in folder.iterdir() if not path.name.startswith((CHECKED, _LOCK))}
    temporary = {name + UNFINISHED for name in _NAMES}
    # Without tokens.json or a temporary file, train.bin and the like may be of something else.
    is_ours = bool(names & {*temporary, DESCRIPTION})
    if foreign := sorted(names - {*_NAMES} - temporary if is_ours else names):
        shown = ", ".join([*foreign[:3], "…"] if foreign[3:] else foreign)
        raise ValueError(f"{folder} holds files that are no prepared text ({shown}); name another folder")
