"""Files and folders: atomic writes, locks, owners and modes, checksums, JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written. An earlier file is unchanged.
    """
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; values outside of JSON, such as NaN, raise ValueError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch path to write a file or folder at, and rename it to `path` at the end; see `rename`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    # of a killed process with the same number
    _remove(scratch)
    try:
        yield scratch
        rename(scratch, path)
    finally:
        _remove(scratch)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def rename(scratch: Path, path: Path) -> None:
    """Rename a file or folder atomically, once its content is on the disk, so that a power failure loses nothing.

    A file of the new name is replaced; a folder of the new name has to be empty.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    for place in (*scratch.rglob("*"), scratch):
        _sync(place)
    os.replace(scratch, path)
    _sync(path.parent)


def _sync(place: Path) -> None:
    """Flush a file or a folder to the disk; not every system can do so for folders."""
    if place.is_dir():
        if os.name != "posix":
            return
        number = os.open(place, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise
        finally:
            os.close(number)
    else:
        # Windows flushes only writable files
        with place.open("rb+") as file:
            os.fsync(file.fileno())


def make_private(folder: Path) -> None:
    """Make a folder, and the missing ones above it, private to this user.

    Raises:
        PermissionError: as `check_private`.
        OSError: it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        # another process may have made it since
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
    check_private(folder)


def check_private(path: Path) -> None:
    """Check that only this user and root can change the content of a file or folder, or the target of its path.

    Each folder and symbolic link on the path has to belong to one of the two, and nobody else may write into the
    folders; above the last one others may, where the sticky bit protects files of this user, as in /tmp. A group counts
    as others, unless it is this user's own and has no other members. Access control lists count where they show in the
    mode. Windows is not checked: its folders of users are private.

    Raises:
        PermissionError: others can change it; the message says where and how.
        OSError: there is no such file or folder.
    """
    if os.name != "posix":
        return
    place, left, links = Path("/"), deque(path.absolute().parts[1:]), 0
    while left:
        part = left.popleft()
        if part == "..":
            place = place.parent
            continue
        step = place / part
        status = step.lstat()
        owners = {0, os.geteuid()} if not left else {0, os.geteuid(), _root_of_container()}
        if status.st_uid not in owners:
            raise PermissionError(f"{step} belongs to another user (number {status.st_uid})")
        if stat.S_ISLNK(status.st_mode):
            target, links = Path(os.readlink(step)), links + 1
            if links > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            if target.is_absolute():
                place = Path("/")
            left.extendleft(part for part in reversed(target.parts) if part != "/")
            continue
        sticky = bool(left) and status.st_mode & stat.S_ISVTX
        if not sticky and (status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and _is_shared(status))):
            raise PermissionError(f"{step} can be changed by others (its mode is {stat.S_IMODE(status.st_mode):04o})")
        place = step


def _root_of_container() -> int:
    """The owner of root's files in a container without root, as Apptainer's; else 0."""
    try:
        inside = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
        if any(int(first) == 0 for first, _, _ in inside):
            return 0
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _is_shared(status: os.stat_result) -> bool:
    """Return whether the group of a file may have other members. In a container anybody may be in group 0."""
    try:
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except (ImportError, KeyError):
        return True
    mine = group.gr_gid == user.pw_gid != 0 and group.gr_name == user.pw_name
    return not mine or not {user.pw_name}.issuperset(group.gr_mem)


def open_regular(path: Path) -> BinaryIO:
    """Open a file of others to read bytes, if it is a regular file: a pipe could block the reader.

    Raises:
        OSError: there is no such file, it may not be read, or it is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.open("rb")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that others may have made.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(text: bytes) -> Any:
    """Parse JSON strictly: NaN, which JSON does not have, and nesting beyond Python's recursion limit are refused.

    Raises:
        ValueError: it is damaged; the message says how.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file, which stays; the system releases the lock when the process dies.

    Raises:
        BlockingIOError: another process holds it; with this message.
    """
    # takes a tenth of a second to import
    from filelock import FileLock, Timeout

    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(message) from None
    with held:
        yield


@contextmanager
def lock_output(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file beside a file or folder that will be made, and remove it at the end.

    Raises:
        BlockingIOError: another process holds it; with this message.
    """
    path = path.absolute()
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with lock(file, message):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two configs, such as that of a folder and the one asked for.

    >>> differences({"steps": 10, "lr": 0.1}, {"steps": 20, "lr": 0.1, "seed": 0})
    ['steps was 10, now 20', 'seed was None, now 0']
    """
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
