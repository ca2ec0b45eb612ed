"""A limit on the memory of a process that maps most of its data from files, as `from_pretrained` does with weights.

The system takes such pages back when memory is short. A limit does so before: on a shared machine, for instance.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

# Of Linux from 5.4 on: pages leave memory, and come back when they are used. No data is lost, whatever is there.
_PAGEOUT = 21
# Smaller regions are data of libraries.
_SMALL = 2**20
# The share of the limit from which pages are given back, and seconds between two looks.
_SHARE, _INTERVAL = 0.75, 0.01


@contextmanager
def limited_memory(limit: int) -> Iterator[None]:
    """Give mapped pages back to the system whenever the process holds more than three quarters of a number of bytes.

    Memory that no file holds stays, also pages of files that the process has changed. ValueError on systems other than
    Linux, and before version 5.4.
    """
    if sys.platform != "linux":
        raise ValueError("a limit on memory needs Linux; elsewhere, mapped weights are dropped if memory is short")
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        if _page_out(ctypes.addressof(ctypes.c_char.from_buffer(page)), mmap.PAGESIZE):
            raise ValueError(
                "a limit on memory needs Linux 5.4 or later; mapped weights are dropped if memory is short"
            )
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
    pause = _INTERVAL
    while not stopped.wait(pause):
        pause = _INTERVAL
        if _resident_bytes() > most:
            for first, end in _mapped_regions():
                _page_out(first, end - first)
            # What is left is not mapped: looking again and again does not help.
            if _resident_bytes() > most:
                pause = 20 * _INTERVAL


def _page_out(first: int, size: int) -> int:
    """Return 0, or -1 if it failed; another thread may have unmapped the pages meanwhile, and used their addresses."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    result: int = madvise(first, size, _PAGEOUT)
    return result


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * mmap.PAGESIZE


def _mapped_regions() -> Iterator[tuple[int, int]]:
    """Iterate over the addresses where tensors of files are: first, and one after the last."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, mode, _offset, _device, inode, *_ = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in addresses.split("-"))
        if mode.startswith("rw") and inode != "0" and end - first >= _SMALL:
            yield first, end
