"""Atomic writes, and locks."""

import os
from pathlib import Path

import pytest

from einlinear.files import lock, open_regular, sha256_of, write_json, write_text


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to a pipe").symlink_to("pipe")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "to a pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".note"
    write_text(path, "abc")
    assert path.read_text(encoding="utf-8") == "abc"
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "another")
    assert path.read_text(encoding="utf-8") == "abc"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        lock(tmp_path / ".lock", "taken"),
        pytest.raises(BlockingIOError, match="taken"),
        lock(tmp_path / ".lock", "taken"),
    ):
        pass
    with lock(tmp_path / ".lock", "taken"):
        pass
