"""The kernels: prebuilt in a wheel, or compiled once per machine, and loaded as functions of raw pointers."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from einlinear.files import cache_folder, check_private, make_private, rename, sha256_of
from einlinear.ops.cpu.toolchain import FLAGS, NUMBERS, TARGETS, find_compiler, flag_of

logger = logging.getLogger("einlinear")

SOURCE = Path(__file__).with_name("kernel.cpp")
DTYPES = {getattr(torch, name): name for name in NUMBERS}
# how the names of folders of compilations on this machine begin
_SCRATCH = f".build-{platform.node()}-"


class Pairs(ctypes.Structure):
    """The pairs of a token and an expert, as `Pairs` in routed.h says."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("first", "order", "gates")]
    _fields_ += [(name, ctypes.c_int64) for name in ("tokens", "block", "experts", "active")]


class QuantizedFactor(ctypes.Structure):
    """A factor in few bits, as `QuantizedFactor` in quantized_factors.h says."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_int64) for name in ("bits", "group", "groups", "row_bytes")),
    )


class OpenMP(ctypes.Structure):
    """Functions of an OpenMP runtime, as `OpenMP` in team.h says."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "barrier", "thread", "threads")]


class Library:
    """The compiled kernels for one dtype, as functions of raw pointers; `origin` says where they come from."""

    def __init__(self, path: Path, origin: str) -> None:
        library = ctypes.CDLL(str(path))
        self.origin, pointer, count = origin, ctypes.c_void_p, ctypes.c_int64
        self.forward, self.backward = library.einlinear_forward, library.einlinear_backward
        self.forward_quantized = library.einlinear_forward_quantized
        self.feed_forward, self.feed_forward_backward = (
            library.einlinear_feed_forward,
            library.einlinear_feed_forward_backward,
        )
        arguments = ((self.forward, 7), (self.forward_quantized, 5), (self.backward, 9))
        for function, pointers in (*arguments, (self.feed_forward, 3), (self.feed_forward_backward, 5)):
            function.argtypes, function.restype = [*[pointer] * pointers, count, ctypes.c_int], None
        self.tile = library.einlinear_tile
        self.tile.argtypes, self.tile.restype = [pointer, count], count
        if runtime := _find_openmp():
            ctypes.pointer(OpenMP.in_dll(library, "einlinear_openmp"))[0] = runtime


def _find_openmp() -> OpenMP | None:
    """Return the OpenMP runtime that torch uses: a preloaded one, or one of its libraries; None if there is none."""
    for place in (None, torch._C.__file__):
        with suppress(OSError, AttributeError, TypeError):
            runtime = ctypes.CDLL(place)
            names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
            return OpenMP(*[ctypes.cast(runtime[name], ctypes.c_void_p) for name in names])
    return None


@cache
def load(dtype: torch.dtype) -> Library | str:
    """Return the kernels that EINLINEAR_KERNELS chooses, by default the best for the processor, or why not."""
    choice = os.environ.get("EINLINEAR_KERNELS", "")
    if choice == "0":
        return "they are turned off by EINLINEAR_KERNELS=0"
    try:
        return _choose(choice, DTYPES[dtype])
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("einlinear runs without its compiled CPU kernels, which is slower: %s", error)
        return str(error)


def _choose(choice: str, dtype: str) -> Library:
    """Load the best prebuilt library that the processor can run, else compile one; `choice` may name its target."""
    targets, features = TARGETS.get(platform.machine(), {}), _processor().split()
    if choice not in ("", "compile", *targets):
        raise RuntimeError(f"EINLINEAR_KERNELS={choice!r} is unknown: choose {', '.join(['0', 'compile', *targets])}")
    for name, target in targets.items():
        if choice not in ("", name):
            continue
        missing = target.features.difference(features)
        if choice and missing:
            raise RuntimeError(f"EINLINEAR_KERNELS={name}, but this processor lacks {', '.join(sorted(missing))}")
        prebuilt = SOURCE.with_name(f"kernel-{name}-{dtype}.so")
        if not missing and prebuilt.is_file():
            return Library(prebuilt, f"prebuilt for {name}")
    if choice in targets:
        return Library(build(targets[choice].flags, dtype), f"compiled for {choice}")
    return Library(build(("-march=native",), dtype), "compiled for this machine")


def build(machine_flags: Sequence[str], dtype: str) -> Path:
    """Return the kernels in $EINLINEAR_CACHE (by default ~/.cache/einlinear), compiled if they are not there intact."""
    command = [*find_compiler(), *FLAGS, *machine_flags, flag_of(dtype)]
    source = b"".join(path.read_bytes() for path in [*sorted(SOURCE.parent.glob("*.h")), SOURCE])
    key = hashlib.sha256(source + repr((command, _processor())).encode()).hexdigest()[:16]
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
        return _compile(command, folder, key)


def _processor() -> str:
    """Return a line with the features of the processor, on which -march=native depends."""
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
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
        library = Path(scratch) / "kernel.so"
        arguments = [*command, str(SOURCE), "-o", str(library)]
        try:
            run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"the compiler {command[0]!r} failed: {error}") from error
        if run.returncode or not library.is_file():
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            error_line = next((line for line in lines if "error" in line), lines[0])
            raise RuntimeError(f"{command[0]!r} does not compile {SOURCE.name}: {error_line}")
        # whatever the umask
        library.chmod(0o700)
        path = folder / f"kernel-{key}-{sha256_of(library)[:32]}.so"
        rename(library, path)
        return path
