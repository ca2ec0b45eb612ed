"""The C allocator: keep the memory that one training step frees for the next one."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# The largest threshold that glibc's own adjustment reaches, and its default limit of mapped blocks.
_LARGEST_THRESHOLD, _DEFAULT_MMAP_MAX = 32 * 2**20, 65536


# Open contexts: trainings of one process may take turns.
_users = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process as long as the context lasts; without effect unless the C library is glibc.

    By default glibc returns activations and gradients to the system when they are freed, and the next step gets them
    back as empty pages, one page fault for every 4 KB.
    """
    global _users
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            # The defaults cannot be restored: glibc no longer adjusts a threshold that was set.
            libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            libc.malloc_trim(0)
