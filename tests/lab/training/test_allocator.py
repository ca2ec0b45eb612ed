"""Freed memory stays in the process while a training runs."""

import platform
import resource

import pytest
import torch
from tests.lab.training.toy import run

from einlinear_lab.training import allocator
from einlinear_lab.training.allocator import freed_memory_kept

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def page_faults() -> int:
    """The fewest of several times of allocating, filling and freeing 100 MB, more than glibc keeps on its own."""
    counts = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(25_000_000).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_and_returned_at_the_end() -> None:
    before = resident()
    with freed_memory_kept():
        assert page_faults() < 100
        assert resident() - before > 90_000_000
    assert resident() - before < 50_000_000


def test_the_last_training_of_several_returns_the_memory() -> None:
    before = resident()
    first, second = freed_memory_kept(), freed_memory_kept()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert page_faults() < 100
    assert resident() - before > 90_000_000
    second.__exit__(None, None, None)
    assert resident() - before < 50_000_000


def test_training_keeps_memory() -> None:
    found: list[int] = []
    run(steps=1, progress=lambda *_: found.append(page_faults()))
    assert found[0] < 100


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("its functions are unknown"))
    with freed_memory_kept():
        pass
