"""Writes a prepared text: either all of its files are there under their names, or none can be taken for whole."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy.typing as npt

from einlinear.files import lock
from einlinear.version import __version__
from einlinear_lab.data.text.encode import BytePairs, Vocabulary
from einlinear_lab.data.text.tokens import (
    CHECKED,
    DESCRIPTION,
    FORMAT,
    TOKENIZER,
    TRAIN,
    UNFINISHED,
    VALIDATION,
    Counts,
    describe,
)

_NAMES = (TRAIN, VALIDATION, TOKENIZER, DESCRIPTION)  # in the order in which they get their names
_LOCK = ".lock"


class Writer:
    """Writes tokens into a folder, to be used in a `with` statement.

    All files have other names until `finish`, which renames them, tokens.json last. A folder without tokens.json is no
    prepared text, so a process that is killed at any moment leaves none that looks whole; the next `Writer` writes over
    what it left. A prepared text that was in the folder stays until `finish`. Nothing is forced onto the disk: should
    the machine lose power just then, sizes and checksums tell when the text is opened.

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

    def __enter__(self) -> Writer:
        otherwise = f"another process is preparing a text in {self.folder}; wait for it, or end it"
        self._lock.enter_context(lock(self.folder / _LOCK, otherwise))
        for name in (TRAIN, VALIDATION):
            self._files[name] = self._part(name).open("wb")  # over what an interrupted preparation left
        return self

    def __exit__(self, error: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if not self._finished:
            for name in _NAMES:
                self._part(name).unlink(missing_ok=True)
        with suppress(OSError):  # Windows removes it when it is let go
            (self.folder / _LOCK).unlink()
        self._lock.close()
        if self._created and not self._finished:
            with suppress(OSError):  # not empty after all
                self.folder.rmdir()

    def add(self, name: str, tokens: npt.NDArray[Any]) -> None:
        """Append tokens to train.bin or validation.bin."""
        self._files[name].write(tokens.data)
        self._digests[name].update(tokens.data)

    def finish(self, vocabulary: Vocabulary, counts: list[Counts], recipe: dict[str, Any]) -> None:
        """Write what remains to be written, and give all files their names."""
        files: dict[str, dict[str, Any]] = {}
        for name, file in self._files.items():
            files[name] = {"bytes": file.tell(), "sha256": self._digests[name].hexdigest()}
            file.close()
        if isinstance(vocabulary, BytePairs):
            content = vocabulary.content.encode()
            files[TOKENIZER] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self._part(TOKENIZER).write_bytes(content)
        description = {
            "format": FORMAT,
            "einlinear": __version__,
            "vocabulary": describe(vocabulary),
            "dtype": "uint8" if vocabulary.end.itemsize == 1 else "uint16, little-endian",
            "files": files,
            "counts": [asdict(part) for part in counts],
            "recipe": recipe,
        }
        content = (json.dumps(description, indent=2, allow_nan=False) + "\n").encode()
        self._part(DESCRIPTION).write_bytes(content)
        for name in (DESCRIPTION, CHECKED, TOKENIZER):  # of the text that was here before
            (self.folder / name).unlink(missing_ok=True)
        for name in _NAMES:
            if name in (*files, DESCRIPTION):
                os.replace(self._part(name), self.folder / name)
        self._finished = True

    def _part(self, name: str) -> Path:
        return self.folder / (name + UNFINISHED)

    def _check_folder(self) -> None:
        """Refuse to write among files that are not of a prepared text, or over any that may not be."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the tokens")
        found = {path.name for path in self.folder.iterdir() if not path.name.startswith((CHECKED, _LOCK))}
        parts = {name + UNFINISHED for name in _NAMES}
        foreign = sorted(found - {*_NAMES} - parts)
        if not found & {*parts, DESCRIPTION}:  # nothing says that train.bin and the like are of a prepared text
            foreign = sorted(found)
        if foreign:
            raise ValueError(
                f"{self.folder} holds files that are no prepared text ({', '.join(foreign[:3])}"
                f"{', …' if foreign[3:] else ''}); name another folder"
            )
