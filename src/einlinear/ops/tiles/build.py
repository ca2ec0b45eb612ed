"""The compiled kernels: built on demand with the user's compiler, loaded as functions of raw pointers.

They are one translation unit with a C interface, so they are compiled within seconds, once per machine, and work with
every version of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger("einlinear")

SOURCE = Path(__file__).with_name("tiles.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_THREADS = ("-fopenmp",), ()  # tried in turn: without OpenMP the kernels run on one thread


class Library:
    """The compiled kernels, one for every dtype, as functions of raw pointers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.functions = {}
        for dtype, name in DTYPES.items():
            for role, pointers in (("forward", 6), ("backward", 7)):
                function = library[f"{name}_{role}"]
                function.argtypes, function.restype = [*[pointer] * pointers, count, threads], None
                self.functions[role, dtype] = function
            for role, pointers in (("forward_grouped", 8), ("backward_grouped", 10)):
                function = library[f"{name}_{role}"]
                function.argtypes, function.restype = [*[pointer] * pointers, *[count] * 4, threads], None
                self.functions[role, dtype] = function
            function = library[f"{name}_tile"]
            function.argtypes, function.restype = [pointer, count], count
            self.functions["tile", dtype] = function


@lru_cache(maxsize=1)
def load() -> Library | str:
    """The kernels, compiled if this machine has not done so yet; or why there are none."""
    try:
        return Library(build(("-march=native",)))
    except (OSError, RuntimeError) as error:
        logger.warning("einlinear runs without its compiled CPU kernels, which is slower: %s", error)
        return str(error)


def build(machine_flags: Sequence[str]) -> Path:
    """Compile the kernels into $EINLINEAR_CACHE (by default ~/.cache/einlinear), or find what was compiled before.

    Raises:
        RuntimeError: no compiler ($CXX, c++, g++ or clang++), or it fails; the message says what it said.
        OSError: the folder cannot be written.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in $CXX")
    source = b"".join(path.read_bytes() for path in [*sorted(SOURCE.parent.glob("*.h")), SOURCE])
    key = hashlib.sha256(source + repr((compiler, *FLAGS, *machine_flags, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("EINLINEAR_CACHE") or "~/.cache/einlinear").expanduser() / "kernels"
    path = folder / f"tiles-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Compiling the CPU kernels, once: %s", path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        said = ""
        for threads in _THREADS:
            made = Path(scratch) / "tiles.so"
            command = [compiler, *FLAGS, *machine_flags, *threads, str(SOURCE), "-o", str(made)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"the compiler {compiler!r} failed: {error}") from error
            if run.returncode == 0:
                made.replace(path)  # in one step, so that no other process sees half of it
                return path
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            said = said or next((line for line in lines if "error" in line), lines[0])
    raise RuntimeError(f"{compiler!r} does not compile {SOURCE.name}: {said}")


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
