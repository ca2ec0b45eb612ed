"""Files and folders: regular, private, whole or absent, locked, checksummed, compared with what is asked of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written.

    Raises:
        OSError: the disk is full, or the folder cannot be written. A file that was there before is as it was.
    """
    scratch = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
        rename(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON; what JSON has no words for, such as NaN, is an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def rename(scratch: Path, path: Path) -> None:
    """Give a file, or a folder of files, its name: on disk before it has the name, even if the power fails.

    A file of that name is replaced; a folder of that name has to be empty.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    for place in (*scratch.rglob("*"), scratch):
        _sync(place)
    os.replace(scratch, path)
    _sync(path.parent)


def _sync(place: Path) -> None:
    """Have a file or a folder written to the disk; systems that cannot do so for folders need not."""
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
        with place.open("rb+") as file:  # which Windows wants to be writable
            os.fsync(file.fileno())


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone.

    Raises:
        PermissionError: as `check_private`.
        OSError: it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        with suppress(FileExistsError):  # another process has made it since
            place.mkdir(mode=0o700)
    check_private(folder)


def check_private(path: Path) -> None:
    """Check that nobody but this user and root can change what a file or folder holds, or what its path leads to.

    So each folder and each symbolic link on the way has to belong to one of the two, and no others may write into the
    folders; above the last one they may where the sticky bit keeps them from replacing what is not theirs, as in /tmp.
    A group counts as others, unless it is this user's own and has no other members. Access control lists count where
    they show in the mode. Windows is not checked: its folders of users are private.

    Raises:
        PermissionError: others can; the message says where and how.
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
    """The number that root's files have in a container that does not know root, as Apptainer's; else 0."""
    try:
        inside = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
        if any(int(first) == 0 for first, _, _ in inside):
            return 0
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _is_shared(status: os.stat_result) -> bool:
    """Whether the group of a file may have other members than this user. Anybody may be in group 0 in a container."""
    try:
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except (ImportError, KeyError):
        return True
    mine = group.gr_gid == user.pw_gid != 0 and group.gr_name == user.pw_name
    return not mine or not {user.pw_name}.issuperset(group.gr_mem)


def open_regular(path: Path) -> BinaryIO:
    """Open a file that others made, to read bytes; one that is no file, such as a pipe, could make the reader wait.

    Raises:
        OSError: there is no such file, it may not be read, or it is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.open("rb")


def read_json(path: Path) -> Any:
    """The content of a JSON file that others may have made.

    Raises:
        ValueError: it is damaged, as `from_json` says.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return from_json(file.read())


def from_json(text: bytes) -> Any:
    """What a text in JSON says; NaN, which is none, is refused as well, and what is nested so deeply that it ends us.

    Raises:
        ValueError: it is damaged, and how.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file, which stays; the system lets go of the lock when the process dies.

    Raises:
        BlockingIOError: another process holds it; `otherwise` is the message.
    """
    from filelock import FileLock, Timeout  # which takes a tenth of a second to import

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(otherwise) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_beside(path: Path, otherwise: str) -> Iterator[None]:
    """The same for a file or folder that is to be made: the lock lies beside it, and goes when the work is over."""
    path = path.absolute()
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with alone(lock, otherwise):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


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
