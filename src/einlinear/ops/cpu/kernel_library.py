"""The compiled kernels: built once per machine with the user's compiler, loaded as functions of raw pointers."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from einlinear.files import cache_folder, check_private, make_private, rename, sha256_of

logger = logging.getLogger("einlinear")

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
DTYPES = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
# tried in turn: without OpenMP the kernels run on one thread
_THREADS = ("-fopenmp",), ()
# how the names of folders of compilations on this machine begin
_SCRATCH = f".build-{platform.node()}-"


class Pairs(ctypes.Structure):
    """The pairs of a token and an expert, as `Pairs` in routed.h says."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("first", "order", "gates")]
    _fields_ += [(name, ctypes.c_int64) for name in ("tokens", "block", "experts", "active")]


class Library:
    """The compiled kernels, one for every dtype, as functions of raw pointers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self.functions = {}
        for dtype, name in DTYPES.items():
            for role, pointers in (("forward", 7), ("backward", 9)):
                function = library[f"{name}_{role}"]
                function.argtypes, function.restype = [*[pointer] * pointers, count, ctypes.c_int], None
                self.functions[role, dtype] = function
            function = self.functions["tile", dtype] = library[f"{name}_tile"]
            function.argtypes, function.restype = [pointer, count], count


@lru_cache(maxsize=1)
def load() -> Library | str:
    """Return the kernels, compiled if this machine has not done so yet; or why there are none."""
    if os.environ.get("EINLINEAR_KERNELS") == "0":
        return "they are turned off by EINLINEAR_KERNELS=0"
    try:
        return Library(build(("-march=native",)))
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("einlinear runs without its compiled CPU kernels, which is slower: %s", error)
        return str(error)


def build(machine_flags: Sequence[str]) -> Path:
    """Return the kernels in $EINLINEAR_CACHE (by default ~/.cache/einlinear), compiled if they are not there intact."""
    compiler = _compiler()
    source = b"".join(path.read_bytes() for path in [*sorted(SOURCE.parent.glob("*.h")), SOURCE])
    key = hashlib.sha256(source + repr((compiler, *FLAGS, *machine_flags, _processor())).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    try:
        make_private(folder)
    except PermissionError as error:
        advice = "Make it yours alone (chmod go-w, chown), or name another folder in EINLINEAR_CACHE"
        raise PermissionError(f"{error}, so nothing is loaded from {folder}. {advice}") from None
    if path := _find(folder, key):
        return path
    with _lock(folder) as locked:
        # another process may have compiled it meanwhile
        if path := _find(folder, key):
            return path
        _clean(folder, key, locked)
        return _compile([*compiler, *FLAGS, *machine_flags], folder, key)


def _compiler() -> list[str]:
    """Return the command of the compiler: $CXX may be "ccache g++"."""
    named = os.environ.get("CXX")
    if not named:
        for compiler in filter(shutil.which, ("c++", "g++", "clang++")):
            return [compiler]
        raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in $CXX")
    if shutil.which(named):
        return [named]
    try:
        return shlex.split(named, posix=os.name == "posix")
    except ValueError as error:
        raise RuntimeError(f"CXX={named!r} is not a command: {error}") from None


def _processor() -> str:
    """Return the features of the processor, on which -march=native depends: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _find(folder: Path, key: str) -> Path | None:
    return next((path for path in folder.glob(f"kernel-{key}-*.so") if _is_intact(path)), None)


def _is_intact(path: Path) -> bool:
    try:
        check_private(path)
        return path.stem.endswith(f"-{sha256_of(path)[:32]}")
    except OSError:
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock the folder; yield whether that succeeded: some file systems cannot, and a process that hangs may hold it."""
    # takes a tenth of a second to import
    from filelock import FileLock

    lock = FileLock(folder / ".lock")
    with suppress(OSError, NotImplementedError):
        lock.acquire(timeout=600)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _clean(folder: Path, key: str, locked: bool) -> None:
    """Remove damaged files, and folders of killed compilations: this machine's if it has the lock, others if old."""
    for path in folder.glob(f"kernel-{key}-*.so"):
        if not _is_intact(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for left in (*folder.glob(".build-*"), *folder.glob("tmp*")):
        with suppress(OSError):
            if (locked and left.name.startswith(_SCRATCH)) or left.lstat().st_mtime < time.time() - 3600:
                shutil.rmtree(left)


def _compile(command: Sequence[str], folder: Path, key: str) -> Path:
    logger.info("Compiling the CPU kernels, once, into %s", folder)
    error_line = ""
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
        for threads in _THREADS:
            library = Path(scratch) / "kernel.so"
            arguments = [*command, *threads, str(SOURCE), "-o", str(library)]
            try:
                run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"the compiler {command[0]!r} failed: {error}") from error
            if run.returncode == 0 and library.is_file():
                # whatever the umask
                library.chmod(0o700)
                path = folder / f"kernel-{key}-{sha256_of(library)[:32]}.so"
                rename(library, path)
                return path
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            error_line = error_line or next((line for line in lines if "error" in line), lines[0])
    raise RuntimeError(f"{command[0]!r} does not compile {SOURCE.name}: {error_line}")
