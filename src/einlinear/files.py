"""Files and folders: atomic writes, locks, owners and modes, checksums, JSON. Errors of the disk raise OSError."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: if the disk is full, an earlier file is unchanged."""
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
    """Rename a file or folder atomically, once its content is on the disk; replaces a file or an empty folder."""
    for place in (*scratch.rglob("*"), scratch):
        _sync(place)
    os.replace(scratch, path)
    _sync(path.parent)


def _sync(place: Path) -> None:
    is_folder = place.is_dir()
    if is_folder and os.name != "posix":
        return
    # Windows flushes only writable files
    number = os.open(place, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        # not every system can flush folders
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def check_folder(path: str | Path, argument: str) -> None:
    """Raise ValueError for a path that cannot be a folder, since it or one above it is a file."""
    place = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"{argument} {path} cannot be a folder: {place} is a file")


def cache_folder() -> Path:
    """Return the folder of what this machine computes once: $EINLINEAR_CACHE, by default ~/.cache/einlinear."""
    return Path(os.environ.get("EINLINEAR_CACHE") or "~/.cache/einlinear").expanduser().absolute()


def make_private(folder: Path) -> None:
    """Make a folder, and the missing ones above it, private to this user; PermissionError as `check_private`."""
    for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        # another process may have made it since
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
    check_private(folder)


def check_private(path: Path) -> None:
    """Raise PermissionError if others than this user and root can change a path, by the rules of docs/security.md."""
    # on Windows the folders of users are private
    if os.name == "posix":
        # raises OSError for links in a circle
        path.stat()
        _check_links(path.absolute(), is_last=True)


def _check_links(path: Path, is_last: bool) -> None:
    """Check a path folder by folder, and the targets of links; the last folder of all has stricter rules."""
    for place in (*reversed(path.parents[:-1]), path):
        status = place.lstat()
        strict = is_last and place == path
        if status.st_uid not in {0, os.geteuid(), 0 if strict else _root_of_container()}:
            raise PermissionError(f"{place} belongs to another user (number {status.st_uid})")
        by_others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and _is_shared(status))
        if stat.S_ISLNK(status.st_mode):
            _check_links(place.parent.resolve() / os.readlink(place), strict)
        elif by_others and (strict or not status.st_mode & stat.S_ISVTX):
            raise PermissionError(f"{place} can be changed by others (its mode is {stat.S_IMODE(status.st_mode):04o})")


def _root_of_container() -> int:
    """Return the owner of root's files in a container without root, as Apptainer's; else 0."""
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
    """Open a file of others to read bytes; OSError unless it is a regular file: a pipe could block the reader."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.open("rb")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that others may have made; ValueError if it is damaged."""
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(text: bytes) -> Any:
    """Parse JSON; ValueError if it is damaged, and for NaN and nesting beyond Python's recursion limit."""

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
    """Hold a lock file, which stays; the system frees it if the process dies. BlockingIOError if others hold it."""
    # takes a tenth of a second to import
    from filelock import FileLock, Timeout

    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(message) from None
    with held:
        yield


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two configs, such as that of a folder and the one asked for.

    >>> differences({"steps": 10, "lr": 0.1}, {"steps": 20, "lr": 0.1, "seed": 0})
    ['steps was 10, now 20', 'seed was None, now 0']
    """
    pairs = [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]
