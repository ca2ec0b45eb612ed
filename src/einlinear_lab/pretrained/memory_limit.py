"""A limit on the memory of a process that maps most of its data from files, as `from_pretrained` does with weights.

The system takes such pages back when memory is short. A limit does so before: on a shared machine, for instance.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

# Of Linux: pages of a mapped file are read again when they are used.
_DONTNEED = 4
# Smaller regions are data of libraries.
_SMALL = 2**20
# The share of the limit from which pages are given back, and seconds between two looks.
_SHARE, _INTERVAL = 0.75, 0.01


@contextmanager
def limited_memory(limit: int) -> Iterator[None]:
    """Give mapped pages back to the system whenever the process holds more than three quarters of a number of bytes.

    Memory that no file holds stays, and so do files of which the process has changed its own copy in place; none may be
    changed inside. ValueError on systems other than Linux.
    """
    if sys.platform != "linux":
        raise ValueError("a limit on memory needs Linux; elsewhere, mapped weights are dropped if memory is short")
    stopped = Event()
    thread = Thread(target=_keep_below, args=(_SHARE * limit, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def peak_bytes_of_process() -> int:
    """Return the most bytes that this process has had in memory so far, mapped files included (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def unmapped_weights(model: Any) -> list[str]:
    """Return the names of the parameters that are in memory, and not mapped from a file."""
    # Memory that torch manages, and not a file's.
    return [name for name, p in model.named_parameters() if p.untyped_storage().resizable()]


def _keep_below(most: float, stopped: Event) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    pause = _INTERVAL
    while not stopped.wait(pause):
        pause = _INTERVAL
        if _resident_bytes() > most:
            for first, end in _mapped_regions():
                madvise(first, end - first, _DONTNEED)
            # What is left is not mapped: looking again and again does not help.
            if _resident_bytes() > most:
                pause = 20 * _INTERVAL


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _mapped_regions() -> Iterator[tuple[int, int]]:
    """Iterate over the addresses where tensors of files are, as they are in the file: first, and one after the last."""
    region: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            # Addresses, mode, offset, device and inode of the next region.
            first, end = (int(address, 16) for address in key.split("-"))
            is_mapped = values[0].startswith("rw") and values[3] != "0" and end - first >= _SMALL
            region = (first, end) if is_mapped else None
        # Pages that were changed.
        elif key == "Anonymous:" and values[0] == "0" and region is not None:
            yield region
