"""`einlinear prepare`."""

import gzip
import re
from pathlib import Path

import pytest
from tests.lab.cli.command import assert_refused, run, said_default
from tests.lab.data.samples import needs, prose

from einlinear_lab.cli import packages
from einlinear_lab.data import TextConfig, load_tokens
from einlinear_lab.data.text import prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(prose(300) + "é\n")
    return tmp_path / "a.txt"


def test_prepared_and_again(source: Path, tmp_path: Path) -> None:
    code, out, err = run("prepare", source, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    found = load_tokens(tmp_path / "out")
    (part,) = found.counts
    assert f"{part.documents} 0 {part.characters:,} 1 0 {part.train_tokens:,} {part.validation_tokens:,}" in re.sub(
        " +", " ", out
    )
    assert f"1 text file at {source}." in out
    assert (
        f"{len(found.train):,} tokens to train on, {len(found.validation):,} held out; a vocabulary of 96, 1.00" in out
    )

    before = (tmp_path / "out" / "train.bin").stat()
    code, out, _ = run("prepare", source, "--out", tmp_path / "out")
    assert code == 0
    assert "holds this text already; --fresh prepares it again." in out
    assert (tmp_path / "out" / "train.bin").stat() == before
    code, out, _ = run("prepare", source, "--out", tmp_path / "out", "--fresh")
    assert code == 0
    assert (tmp_path / "out" / "train.bin").stat().st_ino != before.st_ino


OWN = {
    "emoji.txt": (prose(300) + "🙂\n").encode(),
    "faces.txt": ("🙂🙂 " * 3000).encode(),
    "latin.txt": prose(300).encode() + b"\xe9\n",
    "binary.bin": bytes(range(256)) * 50,
    "notepad.txt": (prose(300) + "漢字").encode("utf-16"),
    "packed.txt.gz": gzip.compress((prose(300) + "🙂").encode(), mtime=0),
}


@pytest.mark.parametrize("name", OWN)
def test_a_text_that_characters_cannot_express_becomes_bytes(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    source.write_bytes(OWN[name])
    code, out, err = run("prepare", source, "--out", tmp_path / "out")
    assert code == 0
    reason = {"latin.txt": "is not UTF-8 text", "binary.bin": "is not text but a binary file"}
    assert f"The tokens are bytes: {source} {reason.get(name, 'has the character')}" in err
    assert "a vocabulary of 256" in out
    found = load_tokens(tmp_path / "out")
    everything = bytes([*found.train, *found.validation])
    last = {"latin.txt": b"\xe9", "binary.bin": b"\xff", "notepad.txt": "漢字".encode()}.get(name, "🙂".encode())
    assert everything.count(last) == {"faces.txt": 6000, "binary.bin": 50}.get(name, 1)
    assert found.config["tokens"] == "bytes"
    assert run("prepare", source, "--out", tmp_path / "out")[:2][0] == 0, "the same command finds it"
    assert run("prepare", source, "--out", tmp_path / "other", "--tokens", "bytes")[2] == ""
    assert load_tokens(tmp_path / "other").sha256 == found.sha256


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_marks_and_line_ends_of_other_systems_are_no_reason(ending: str, tmp_path: Path) -> None:
    source = tmp_path / "naïve text.txt"
    source.write_bytes((prose(300) + "na\u00efve\n").replace("\n", ending).encode("utf-8-sig"))
    code, out, err = run("prepare", source, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "a vocabulary of 96" in out
    assert "\r" not in load_tokens(tmp_path / "out").tokenizer.decode(load_tokens(tmp_path / "out").train)


@needs("tokenizers")
def test_byte_pairs(source: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "prepare", source, "--out", tmp_path / "out", "--tokens", "bpe", "--vocab-size", 300, "--limit", "10k"
    )
    assert code == 0
    assert "a vocabulary of 300" in out
    assert load_tokens(tmp_path / "out").counts[0].characters == 10_000


def test_the_help_says_the_default() -> None:
    assert int(said_default("prepare", "vocab_size")) == TextConfig(sources=("a.txt",), tokens="bpe").vocab_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.txt",), "nowhere.txt does not exist; give one of english, code"),
        (("english",), "run tools/fetch_english.sh"),
        (("a.txt", "--vocab-size", "300"), "vocab_size=300 is for bpe; the characters are always 96"),
        (("a.txt", "--tokens", "word"), "tokens must be auto, char, bytes or bpe, not 'word'"),
        (("a.txt", "--tokens", "bpe", "--vocab-size", "70000"), "vocab_size 70000 is too large"),
        (("a.txt", "--limit", "much"), "--limit: 'much' is no number"),
        (("a.txt", "--limit", "1,2"), "--limit 1,2: give one number"),
        (("a.txt", "--validation", "0.9"), "validation=0.9: it must be more than 0"),
        (("a.txt", "a.txt"), "a.txt is given twice"),
        (("latin.txt", "--tokens", "char"), "latin.txt is not UTF-8 text"),
        (("latin.txt", "--tokens", "bpe"), "or take its bytes as they are: --tokens bytes"),
        (
            ("emoji.txt", "--tokens", "bytes", "--vocab-size", "300"),
            "vocab_size=300 is for bpe; the bytes are always 256",
        ),
        (("rows.csv",), "rows.csv has no column `text` with a text (it has title, body); such a column is read"),
        (("rows.jsonl",), "line 2 of"),
        (("folder",), "folder has no .txt files, neither directly nor in subfolders (it has .md; name such a file"),
        (("empty.txt",), "empty.txt: no text is left to prepare"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("EINLINEAR_DATA", str(source.parent / "none"))
    monkeypatch.setattr("einlinear_lab.cli.packages.find_spec", lambda module: module)
    Path("latin.txt").write_bytes(prose(300).encode() + b"\xe9")
    Path("empty.txt").touch()
    Path("emoji.txt").write_text(prose(300) + "🙂")
    Path("rows.csv").write_text("title,body\nx,y\n")
    Path("rows.jsonl").write_text('{"text": "x"}\n{"messages": []}\n')
    Path("folder").mkdir()
    Path("folder", "a.md").touch()
    assert_refused(run("prepare", *arguments, "--out", "out"), message)
    assert not Path("out").exists()


def test_interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_encode", impatient)
    code, _, err = run("prepare", source, "--out", tmp_path / "out")
    assert code == 130
    assert f"Interrupted. The same command prepares {tmp_path / 'out'} from the start." in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("absent", "arguments"),
    [
        ("tokenizers", ("a.txt", "--tokens", "bpe")),
        ("datasets", ("openwebtext",)),
        ("datasets", ("hub:someone/something",)),
    ],
)
def test_missing_packages_are_named(absent: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module == absent else module)
    code, out, err = run("prepare", *arguments, "--out", "out")
    assert code == 1
    assert f"({absent})" in out + err
    assert "pip install 'einlinear[lab]'" in out + err
