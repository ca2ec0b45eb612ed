"""Writes a prepared text atomically: all of its files get their names at the end, tokens.json last."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from einlinear.files import lock
from einlinear.version import __version__
from einlinear_lab.data.text.tokenizer import BPETokenizer, Tokenizer
from einlinear_lab.data.text.tokens import (
    CHECKED,
    DESCRIPTION,
    FORMAT,
    TOKENIZER,
    TRAIN,
    UNFINISHED,
    VALIDATION,
    CorpusCounts,
    describe,
)

# In the order in which they get their names.
_NAMES = (TRAIN, VALIDATION, TOKENIZER, DESCRIPTION)
_LOCK = ".lock"


class TokenWriter:
    """Writes tokens into a folder, to be used in a `with` statement.

    All files have temporary names until `finish`. A folder without tokens.json is no prepared text, so a process that
    is killed at any moment leaves none, and the next writer overwrites its files. A prepared text that was in the
    folder before stays until `finish`. Nothing is forced onto the disk: after a power failure, sizes and checksums show
    the damage when the text is opened.

    Args:
        folder: created if it is absent.

    Raises:
        ValueError: the folder is a file, or holds files of the user's.
        BlockingIOError: another process prepares a text in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._check_folder()
        self._created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._finished = False
        self._lock = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in (TRAIN, VALIDATION)}

    def __enter__(self) -> TokenWriter:
        busy = f"another process is preparing a text in {self.folder}; wait for it, or end it"
        self._lock.enter_context(lock(self.folder / _LOCK, busy))
        for name in (TRAIN, VALIDATION):
            self._files[name] = self._temporary(name).open("wb")
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
        if isinstance(tokenizer, BPETokenizer):
            content = tokenizer.content.encode()
            files[TOKENIZER] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self._temporary(TOKENIZER).write_bytes(content)
        description = {
            "format": FORMAT,
            "einlinear": __version__,
            "tokenizer": describe(tokenizer),
            "dtype": "uint8" if tokenizer.end.itemsize == 1 else "uint16, little-endian",
            "files": files,
            "counts": [asdict(one) for one in counts],
            "config": config,
        }
        content = (json.dumps(description, indent=2, allow_nan=False) + "\n").encode()
        self._temporary(DESCRIPTION).write_bytes(content)
        # The text that was in the folder before.
        for name in (DESCRIPTION, CHECKED, TOKENIZER):
            (self.folder / name).unlink(missing_ok=True)
        for name in _NAMES:
            if name in (*files, DESCRIPTION):
                os.replace(self._temporary(name), self.folder / name)
        self._finished = True

    def _temporary(self, name: str) -> Path:
        return self.folder / (name + UNFINISHED)

    def _check_folder(self) -> None:
        """Refuse a folder with files that may not be those of a prepared text."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the tokens")
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith((CHECKED, _LOCK))}
        temporary = {name + UNFINISHED for name in _NAMES}
        # Without tokens.json or a temporary file, train.bin and the like may be of something else.
        is_ours = bool(names & {*temporary, DESCRIPTION})
        if foreign := sorted(names - {*_NAMES} - temporary if is_ours else names):
            shown = ", ".join([*foreign[:3], "…"] if foreign[3:] else foreign)
            raise ValueError(f"{self.folder} holds files that are no prepared text ({shown}); name another folder")
