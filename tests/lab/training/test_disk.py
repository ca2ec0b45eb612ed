"""Runs whose files are damaged, or whose disk is full."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab.training import toy

from einlinear import checkpoint
from einlinear_lab.training import metrics

OPTIONS: dict[str, Any] = {"steps": 20, "checkpoint_every": 4, "log_every": 1}


@contextmanager
def no_room_beyond() -> Iterator[Callable[[int], None]]:
    """What a full disk does, after a file has so many bytes: the kernel refuses to write more of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path: Path) -> None:
    whole = toy.run(tmp_path / "whole", **OPTIONS)
    folder = tmp_path / "full"
    with (
        no_room_beyond() as limit,
        pytest.raises(OSError, match=r"the checkpoint .*step-00000012 cannot be written, .*File too large"),
    ):
        toy.run(folder, progress=lambda step, *_: limit(10_000) if step == 10 else None, **OPTIONS)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.step == 8
    assert toy.run(folder, **OPTIONS).losses == whole.losses


def test_a_disk_that_is_full_when_metrics_are_written(tmp_path: Path) -> None:
    whole = toy.run(tmp_path / "whole", **OPTIONS)
    folder = tmp_path / "full"

    def progress(step: int, *_: object) -> None:
        if step == 10:
            limit((folder / "metrics.jsonl").stat().st_size + 20)

    with (
        no_room_beyond() as limit,
        pytest.raises(OSError, match=r"the metrics of the run cannot be written: File too large: '.*metrics\.jsonl'"),
    ):
        toy.run(folder, progress=progress, **OPTIONS)
    # those of step 10 were written before its progress
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == list(range(1, 11))
    assert toy.run(folder, **OPTIONS).losses == whole.losses

    # Also when the lines that are kept are written anew.
    with no_room_beyond() as limit:
        limit(100)
        with pytest.raises(OSError, match="the metrics of the run cannot be written"):
            toy.run(folder, **OPTIONS)
    assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [*range(1, 21), 20]
    assert toy.run(folder, **OPTIONS).losses == whole.losses


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    whole = toy.run(tmp_path, **OPTIONS)
    damaged = tmp_path / "checkpoints" / "step-00000020" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000020 cannot be used: its content is not what was written"):
        again = toy.run(tmp_path, **OPTIONS)
    assert (again.losses, again.metrics) == (whole.losses, whole.metrics)
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [*range(1, 21), 20]
