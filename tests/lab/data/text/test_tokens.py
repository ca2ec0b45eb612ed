"""A prepared text on disk: what is refused when it is opened, and that no interruption leaves one that looks whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.lab.data.samples import needs, prose

from einlinear_lab.data import TextConfig, Tokens, load_tokens, prepare_tokens
from einlinear_lab.data.text import tokens
from einlinear_lab.data.text.tokens import CHECKED, DESCRIPTION, TOKENIZER, TRAIN, VALIDATION, TokenWriter


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    (tmp_path / "a.txt").write_text(prose(300))
    return TextConfig(sources=(str(tmp_path / "a.txt"),))


@pytest.fixture
def folder(config: TextConfig, tmp_path: Path) -> Path:
    return prepare_tokens(config, tmp_path / "out").folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a prepared text, but for the note of what was checked."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKED}


def flip(path: Path, at: int = 100) -> None:
    """Change a byte and keep the size and the time of the file."""
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_is_on_disk(folder: Path) -> None:
    found = load_tokens(folder)
    assert isinstance(found, Tokens)
    assert (found.train.dtype, found.tokenizer.vocab_size) == (np.uint8, 96)
    assert found.train.tobytes() == (folder / TRAIN).read_bytes()
    assert found.validation.tobytes() == (folder / VALIDATION).read_bytes()
    assert not found.train.flags.writeable
    said = json.loads((folder / DESCRIPTION).read_text())
    assert said["format"] == 1
    assert said["dtype"] == "uint8"
    assert said["tokenizer"]["characters"] == "\n" + "".join(map(chr, range(32, 127)))
    (part,) = found.counts
    assert (part.documents, part.documents_dropped, part.characters) == (1, 0, len(prose(300)) - 1)
    assert (part.train_tokens, part.validation_tokens) == (len(found.train), len(found.validation))
    assert len(found.train) + len(found.validation) == part.characters + len("\n\n")
    assert "text file at" in part.origin


def test_the_identity_of_a_text_is_its_content(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(prose(300))
    same = prepare_tokens(TextConfig(sources=(str(tmp_path / "b.txt"),)), tmp_path / "same")
    (tmp_path / "c.txt").write_text(prose(300).replace("text 7:", "text X:"))
    other = prepare_tokens(TextConfig(sources=(str(tmp_path / "c.txt"),)), tmp_path / "other")
    assert load_tokens(folder).sha256 == same.sha256 != other.sha256


def test_checksums_are_computed_once_and_after_every_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    original = tokens.sha256_of

    def counting(path: Path) -> str:
        computed.append(path.name)
        return original(path)

    monkeypatch.setattr(tokens, "sha256_of", counting)
    load_tokens(folder)
    assert computed == [], "noted when the text was prepared"
    (folder / VALIDATION).touch()
    load_tokens(folder)
    assert computed == [TRAIN, VALIDATION]
    (folder / CHECKED).write_text("[]")
    load_tokens(folder)
    load_tokens(folder)
    assert computed == 2 * [TRAIN, VALIDATION]


def test_a_folder_that_cannot_be_written_is_checked_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / CHECKED).unlink()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tokens, "write_text", full)
    load_tokens(folder)
    flip(folder / TRAIN)
    with pytest.raises(ValueError, match="its content has changed"):
        load_tokens(folder)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path, by: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-by] if by > 0 else raw + bytes(-by))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (
        lambda f: flip(f / TRAIN),
        r"train\.bin has the SHA-256 \w{16}…, expected \w{16}…: its content has",
    ),
    "flipped held out": (lambda f: flip(f / VALIDATION), r"validation\.bin has the SHA-256"),
    "truncated": (lambda f: truncate(f / TRAIN, 1), r"train\.bin holds [\d,]+ bytes, expected [\d,]+: it is truncated"),
    "empty": (lambda f: (f / VALIDATION).write_bytes(b""), r"validation\.bin holds 0 bytes, expected .* truncated"),
    "longer": (lambda f: truncate(f / TRAIN, -1), r"train\.bin holds .*: it is another file, or appended to"),
    "missing": (lambda f: (f / TRAIN).unlink(), r"train\.bin is missing, [\d,]+ bytes are expected"),
    "no description": (
        lambda f: (f / DESCRIPTION).unlink(),
        r"holds no prepared text \(.*tokens\.json is missing\); name a folder of einlinear prepare",
    ),
    "half a description": (
        lambda f: truncate(f / DESCRIPTION, 40),
        r"tokens\.json is damaged \(.*\)\. Prepare the text",
    ),
    "foreign": (lambda f: (f / DESCRIPTION).write_text('{"vocab": 65}'), r"tokens\.json is not of einlinear"),
    "foreign list": (lambda f: (f / DESCRIPTION).write_text("[]"), r"tokens\.json is not of einlinear"),
    "other format": (
        lambda f: edited(f, format=2, einlinear="0.9.0"),
        r"prepared by einlinear 0\.9\.0 in format 2, but this one reads format 1",
    ),
    "other characters": (
        lambda f: edited(f, tokenizer={"kind": "char", "vocab_size": 96, "characters": "abc"}),
        r"tokens\.json is damaged \(other characters than this version's\)",
    ),
    "other size": (
        lambda f: edited(f, tokenizer={"kind": "char", "vocab_size": 97, "characters": tokens.CHARACTERS}),
        r"damaged \(vocab_size is 97, but the tokenizer has 96\)",
    ),
    "other kind": (
        lambda f: edited(f, tokenizer={"kind": "word", "vocab_size": 96}),
        "kind 'word', expected char, bytes or bpe",
    ),
    "no files": (lambda f: edited(f, files={}), r"tokens\.json is damaged"),
    "counts of something else": (lambda f: edited(f, counts=[{"name": "a"}]), r"tokens\.json is damaged"),
    "file above": (
        lambda f: edited(f, files=json.loads((f / DESCRIPTION).read_text())["files"] | {"../a": {}}),
        r"tokens\.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(damage: str, folder: Path) -> None:
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load_tokens(folder)


def test_a_damaged_text_is_refused_and_prepared_again_only_if_asked(config: TextConfig, folder: Path) -> None:
    whole = content(folder)
    flip(folder / TRAIN)
    with pytest.raises(ValueError, match=r"its content has changed .* --fresh"):
        prepare_tokens(config, folder)
    prepare_tokens(config, folder, fresh=True)
    assert content(folder) == whole


def test_paths_that_are_no_folder_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; name a folder that einlinear prepare wrote"):
        load_tokens(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name the folder"):
        load_tokens(tmp_path / "file")


@needs("tokenizers")
def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(300))
    folder = prepare_tokens(
        TextConfig(sources=(str(tmp_path / "a.txt"),), tokens="bpe", vocab_size=280), tmp_path / "out"
    ).folder
    assert load_tokens(folder).train.dtype == np.uint16
    flip(folder / TOKENIZER)
    with pytest.raises(ValueError, match=r"tokenizer\.json has the SHA-256"):
        load_tokens(folder)


@pytest.mark.parametrize("names", [["notes.md"], ["train.bin"], ["train.bin", "val.bin"], ["tokens.json", "notes.md"]])
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_the_users_are_never_written_over(
    names: list[str], fresh: bool, config: TextConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in names:
        (mine / name).write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that are no prepared text|tokens\.json is damaged"):
        prepare_tokens(config, mine, fresh=fresh)
    assert content(mine) == dict.fromkeys(names, b"mine")


def test_out_is_a_file(config: TextConfig) -> None:
    with pytest.raises(ValueError, match=r"a\.txt is a file; name a folder for the tokens"):
        prepare_tokens(config, config.sources[0])


def test_one_preparation_at_a_time(config: TextConfig, tmp_path: Path) -> None:
    with (
        TokenWriter(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another process is preparing a text in"),
    ):
        prepare_tokens(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare_tokens(config, tmp_path / "out")


def test_an_error_leaves_nothing(config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(config, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        (tmp_path / "empty").mkdir()
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(config, tmp_path / "empty")
        assert content(tmp_path / "empty") == {}
    before = content(prepare_tokens(config, tmp_path / "there").folder)
    monkeypatch.setattr(TokenWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(config, tmp_path / "there", fresh=True)
    assert content(tmp_path / "there") == before, "what was there stays until its successor is whole"
    load_tokens(tmp_path / "there")


@pytest.mark.parametrize("renames", range(3))
@pytest.mark.parametrize("before", ["nothing", "another text"])
def test_death_between_the_renames(
    renames: int, before: str, config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(prepare_tokens(config, tmp_path / "expected").folder)
    out = tmp_path / "out"
    if before == "another text":
        (tmp_path / "b.txt").write_text(prose(200, "other"))
        prepare_tokens(TextConfig(sources=(str(tmp_path / "b.txt"),)), out)
    done: list[Path] = []

    class Dead(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise Dead
        done.append(target)
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(tokens.os, "replace", replace)
        patch.setattr(
            TokenWriter, "__exit__", lambda self, *_: self._lock.close()
        )  # all that is left to a dead process
        with pytest.raises(Dead):
            prepare_tokens(config, out, fresh=True)
    with pytest.raises(ValueError, match="holds an unfinished preparation; run the same einlinear prepare again"):
        load_tokens(out)
    prepare_tokens(config, out)
    assert content(out) == expected


def test_killed_in_the_middle_and_started_again(config: TextConfig, tmp_path: Path) -> None:
    expected = content(prepare_tokens(config, tmp_path / "expected").folder)
    out = tmp_path / "out"
    slow = f"""
import sys, time
sys.modules.update(tokenizers=None, datasets=None)  # characters of files need neither
from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.data.text import prepare
from einlinear_lab.data.text.tokens import TokenWriter

add = TokenWriter.add

def slowly(self, name, tokens):
    add(self, name, tokens)
    self._files[name].flush()
    time.sleep(0.01)

TokenWriter.add = slowly
prepare._BATCH = 1
prepare_tokens(TextConfig(sources=({config.sources[0]!r},)), {str(out)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", slow])
    part = out / "train.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 5000) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with pytest.raises(BlockingIOError, match="another process is preparing"):
        prepare_tokens(config, out)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5000 < part.stat().st_size < len(expected[TRAIN])
    with pytest.raises(ValueError, match="unfinished preparation; run the same einlinear prepare again"):
        load_tokens(out)
    prepare_tokens(config, out)
    assert content(out) == expected
