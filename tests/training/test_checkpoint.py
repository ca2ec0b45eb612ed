"""Checkpoints: whole or absent, and checked before they are believed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from einlinear.training import checkpoint
from einlinear.training.checkpoint import Checkpoint, latest, load, save


def make(step: int) -> Checkpoint:
    tensors = {"a": torch.arange(6.0).view(2, 3).T + step, "b": torch.tensor([step]), "c": torch.tensor(1.5)}
    return Checkpoint(step, tensors, {"name": "x", "rates": [1, 2.5]})


def same(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    assert found is not None
    assert found.tensors.keys() == wanted.tensors.keys()
    equal = all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    return equal and (found.step, found.facts) == (wanted.step, wanted.facts)


def test_round_trip_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / ".step-00000001.99").mkdir()  # left behind by a process that was killed
    for step in (5, 10, 15):
        assert same(load(save(tmp_path, make(step))), make(step))
    assert same(latest(tmp_path), make(15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("file", ["state.safetensors", "sha256"])
def test_any_flipped_byte_is_noticed(tmp_path: Path, file: str) -> None:
    save(tmp_path, make(1))
    place = save(tmp_path, make(2))
    content = (place / file).read_bytes()
    for position in range(len(content) - (file == "sha256")):  # but for the line feed at the end
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        (place / file).write_bytes(broken)
        with pytest.raises(ValueError, match="step-00000002 cannot be used"):
            load(place)
    with pytest.warns(UserWarning, match="going on from the one before"):
        assert same(latest(tmp_path), make(1))


@pytest.mark.parametrize("length", [0, 1, 7, 100, -1])
def test_truncated(tmp_path: Path, length: int) -> None:
    place = save(tmp_path, make(2))
    content = (place / "state.safetensors").read_bytes()
    (place / "state.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match="not what was written"):
        load(place)
    (place / "state.safetensors").unlink()
    with pytest.raises(ValueError, match="No such file"):
        load(place)


def test_foreign_and_of_another_format(tmp_path: Path) -> None:
    place = save(tmp_path, make(2))
    for metadata, message in (
        (None, "cannot be used"),
        ({"format": "7", "facts": json.dumps({"step": 2})}, "it has format 7, but this version reads 1"),
    ):
        save_file({"a": torch.zeros(1)}, place / "state.safetensors", metadata=metadata)
        (place / "sha256").write_text(checkpoint._digest(place / "state.safetensors"))
        with pytest.raises(ValueError, match=message):
            load(place)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, make(1))

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert same(latest(tmp_path), make(1))
