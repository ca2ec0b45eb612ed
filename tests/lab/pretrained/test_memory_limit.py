"""A limit on memory gives mapped pages back, and never changes what a tensor holds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from einlinear_lab.pretrained import memory_limit as module
from einlinear_lab.pretrained.memory_limit import limited_memory, peak_bytes_of_process, unmapped_weights

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted and given back on Linux alone")
SIZE = 2**25


def resident(tensor: torch.Tensor) -> int:
    """The bytes of the mapped file of a tensor that are in memory."""
    address, is_inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            first, end = (int(part, 16) for part in key.split("-"))
            is_inside = first <= address < end
        elif key == "Rss:" and is_inside:
            return 1024 * int(values[0])
    raise AssertionError("the tensor is nowhere")


@linux
@pytest.mark.parametrize("is_changed", [False, True])
def test_mapped_pages_are_given_back(is_changed: bool, tmp_path: Path) -> None:
    save_file({"x": torch.arange(SIZE // 4, dtype=torch.float32)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    if is_changed:
        x[5] = -1.0
    expected = x.sum(dtype=torch.float64)
    assert resident(x) >= SIZE
    with limited_memory(1):
        deadline = time.monotonic() + 60
        while resident(x) >= SIZE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert resident(x) < SIZE
        # a changed page is in no file
        assert torch.equal(x.sum(dtype=torch.float64), expected)
        assert float(x[5]) == (-1.0 if is_changed else 5.0)


@linux
def test_memory_that_takes_the_place_of_a_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the search for mapped regions and the call that drops their pages, another thread may unmap them."""
    x = torch.ones(SIZE // 4)
    region = (x.data_ptr() + 4095) // 4096 * 4096, x.data_ptr() + x.nbytes
    monkeypatch.setattr(module, "_mapped_regions", lambda: [region])
    with limited_memory(1):
        time.sleep(0.2)
    assert bool((x == 1).all())


@linux
def test_below_a_limit_pages_stay(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(SIZE // 4)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    x.sum()
    with limited_memory(100 * peak_bytes_of_process()):
        time.sleep(0.2)
        assert resident(x) >= SIZE


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="a limit on memory needs Linux"), limited_memory(10**9):
        pass


def test_weights_in_memory_are_named(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert unmapped_weights(layer) == ["weight", "bias"]
    layer.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert unmapped_weights(layer) == []
