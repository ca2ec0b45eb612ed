"""Checkpoints: whole or absent, and checked before they are believed."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from einlinear import checkpoint
from einlinear.checkpoint import Checkpoint, latest, load, save
from einlinear.files import sha256_of


def make(step: int) -> Checkpoint:
    tensors = {"a": torch.arange(6.0).view(2, 3).T + step, "b": torch.tensor([step]), "c": torch.tensor(1.5)}
    return Checkpoint(step, tensors, {"name": "x", "rates": [1, 2.5]})


def same(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    assert found is not None
    assert found.tensors.keys() == wanted.tensors.keys()
    equal = all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    return equal and (found.step, found.metadata) == (wanted.step, wanted.metadata)


def test_round_trip_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / ".step-00000001.99").mkdir()  # left behind by a process that was killed
    for step in (5, 10, 15):
        assert same(load(save(tmp_path, make(step))), make(step))
    assert same(latest(tmp_path), make(15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_damaged_ones_displace_none_that_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest two are damaged: the run goes on from the one before, and what it saves stays."""
    monkeypatch.setattr(checkpoint, "KEPT", 3)
    for step in (10, 20, 30):
        save(tmp_path, make(step))
    monkeypatch.setattr(checkpoint, "KEPT", 2)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / "state.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert same(latest(tmp_path), make(10))
    save(tmp_path, make(15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    assert same(latest(tmp_path), make(15))
    save(tmp_path, make(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_damaged_one_between_displaces_none(tmp_path: Path) -> None:
    save(tmp_path, make(10))
    place = save(tmp_path, make(20))
    (place / "state.safetensors").write_bytes(b"damaged")
    save(tmp_path, make(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


FILES = ("state.safetensors", "sha256")


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """With any byte flipped, in one bit or all, and of any other length."""
    for position in range(len(content)):
        for flip in (1 << position % 8, 0xFF):
            yield f"byte {position}", content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]
    for length in range(len(content)):
        yield f"cut to {length} bytes", content[:length]
    yield "a byte more", content + b"0"


@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, file: str) -> None:
    save(tmp_path, make(1))
    place = save(tmp_path, make(2))
    content = (place / file).read_bytes()
    for what, broken in damaged(content):
        (place / file).write_bytes(broken)
        with pytest.warns(UserWarning, match="step-00000002 cannot be used: .*; going on from the one before"):
            assert same(latest(tmp_path), make(1)), what
    (place / file).unlink()
    with pytest.raises(ValueError, match=r"step-00000002 cannot be used: .*No such file"):
        load(place)
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert same(latest(tmp_path), make(1))
    (place / file).write_bytes(content)
    assert same(latest(tmp_path), make(2))


def test_foreign_and_of_another_format(tmp_path: Path) -> None:
    place = save(tmp_path, make(2))
    for metadata, message in (
        (None, "cannot be used"),
        ({"format": "7", "metadata": json.dumps({"step": 2})}, "it has format 7, but this version reads 1"),
    ):
        save_file({"a": torch.zeros(1)}, place / "state.safetensors", metadata=metadata)
        (place / "sha256").write_text(sha256_of(place / "state.safetensors") + "\n")
        with pytest.raises(ValueError, match=message):
            load(place)


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".step-00000001.{os.getpid()}").mkdir()
    checkpoint.save(tmp_path, Checkpoint(1, {"x": torch.ones(2)}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_tied_weights(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    checkpoint.save(tmp_path, Checkpoint(1, {"embedding": weight, "head": weight, "part": weight[1:]}, {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["embedding"], weight)
    assert torch.equal(found.tensors["head"], weight)
    assert torch.equal(found.tensors["part"], weight[1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_a_file_that_was_read_is_let_go(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Checkpoint(1, {"x": torch.ones(1 << 16)}, {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
