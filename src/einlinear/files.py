"""Files and folders: opened only if regular, written whole or not at all, locked, checksummed, and compared."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written.

    Raises:
        OSError: the disk is full, or the folder cannot be written. A file that was there before is as it was.
    """
    scratch = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # on disk before it has its name, even if the power fails
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON; what JSON has no words for, such as NaN, is an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def open_regular(path: Path) -> BinaryIO:
    """Open a file that others made, to read bytes; one that is no file, such as a pipe, could make the reader wait.

    Raises:
        OSError: there is no such file, it may not be read, or it is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.open("rb")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file, which stays; the system lets go of the lock when the process dies.

    Raises:
        BlockingIOError: another process holds it; `otherwise` is the message.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(otherwise) from None
    try:
        yield
    finally:
        lock.release()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between the settings that a folder was made with and those that are asked for.

    >>> differences({"steps": 10, "lr": 0.1}, {"steps": 20, "lr": 0.1, "seed": 0})
    ['steps was 10, now 20', 'seed was None, now 0']
    """
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
