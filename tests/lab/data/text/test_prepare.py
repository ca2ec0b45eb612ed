"""From documents to tokens: what is held out, what is counted, what is refused."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.lab.data.samples import needs, prose

from einlinear_lab.data import TextConfig, load_tokens, prepare_tokens
from einlinear_lab.data.text import prepare
from einlinear_lab.data.text.prepare import cut


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("length", [1, 7, 100, 10_000])
@pytest.mark.parametrize("text", ["", "\n" * 50, "x" * 1000, prose(40), f"{'x' * 300}\n{'y' * 300}\n"])
def test_pieces_are_the_text(text: str, length: int) -> None:
    pieces = cut(text, length)
    assert "".join(pieces) == text
    assert len(pieces) == max(1, round(len(text) / length))
    assert max(map(len, pieces)) <= 2 * length + 1
    if text == prose(40) and length == 100:
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("kind", ["char", pytest.param("bpe", marks=needs("tokenizers"))])
@pytest.mark.parametrize("validation", [0.05, 0.25])
def test_the_text_that_is_held_out_is_never_trained_on(kind: str, validation: float, tmp_path: Path) -> None:
    """Each part of the text is split inside itself, and every line of it is in exactly one of the splits."""
    sources = [write(tmp_path / f"{name}.txt", prose(lines, name)) for name, lines in (("a", 900), ("b", 400))]
    write(tmp_path / "c" / "1.txt", prose(300, "c1"))
    write(tmp_path / "c" / "deep" / "2.txt", prose(300, "c2"))
    config = TextConfig(
        sources=(*sources, str(tmp_path / "c")),
        tokens=kind,
        vocab_size=300 if kind == "bpe" else None,
        validation=validation,
    )
    found = prepare_tokens(config, tmp_path / "out")
    train, held_out = (
        found.tokenizer.decode(split).replace("<|endoftext|>", "\n") for split in (found.train, found.validation)
    )
    lines = [f"{name} {i}:" for name, count in (("a", 900), ("b", 400), ("c1", 300), ("c2", 300)) for i in range(count)]
    in_train, in_held_out = (set(re.findall(r"^\w+ \d+:", split, re.MULTILINE)) for split in (train, held_out))
    assert in_train | in_held_out == {*lines}
    assert not in_train & in_held_out
    assert len(found.validation) == pytest.approx(validation * len(found.train) / (1 - validation), rel=0.15)
    for name, count, of_part in (("a", 900, 900), ("b", 400, 400), ("c1", 300, 600), ("c2", 300, 600)):
        places = [i for i in range(count) if f"{name} {i}:" in in_held_out]
        assert len(places) == pytest.approx(validation * count, rel=0.4)
        assert max(b - a for a, b in pairwise(places)) < 0.3 * of_part, "all over the part"
        assert places[-1] < count - 1, "not its end"


def test_parts_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "1.txt", f"\n\n{prose(300)}\r\nna\u00efve \u201cquotes\u201d\n\n")
    write(folder / "2.txt", "")
    write(folder / "3.txt", "漢字")
    write(folder / "4.txt", "x" * 150 + "漢")
    write(folder / "notes.md", "not read")
    write(folder / ".hidden" / "5.txt", "not read")
    (part,) = prepare_tokens(TextConfig(sources=(str(folder),), tokens="char"), tmp_path / "out").counts
    assert (part.documents, part.documents_dropped) == (4, 2)
    first = len(f'{prose(300)}\nnaive "quotes"')
    assert (part.characters, part.characters_replaced, part.characters_dropped) == (first + 150, 3, 1 + 2)
    assert part.train_tokens + part.validation_tokens == part.characters + 2 * len("\n\n")
    assert part.name == str(folder)
    assert part.origin == f"4 text files at {folder}"
    assert load_tokens(tmp_path / "out").counts == (part,)


@needs("tokenizers")
def test_byte_pairs_keep_everything(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", f"{prose(300)}漢字\tΕλληνικά\n")
    found = prepare_tokens(TextConfig(sources=(source,), tokens="bpe", vocab_size=300), tmp_path / "out")
    (part,) = found.counts
    assert (part.documents_dropped, part.characters_dropped, part.characters_replaced) == (0, 0, 0)
    assert found.tokenizer.decode(found.train).endswith("漢字\tΕλληνικά<|endoftext|>")
    assert found.train.max() < 300 == found.tokenizer.vocab_size
    assert found.config["vocab_size"] == 300


@needs("tokenizers")
def test_a_tokenizer_never_sees_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = prepare.BPETokenizer.train

    def spying(texts: Iterator[str], size: int) -> Any:
        seen.extend(texts)
        return train(seen, size)

    monkeypatch.setattr(prepare.BPETokenizer, "train", spying)
    source = write(tmp_path / "a.txt", prose(600))
    found = prepare_tokens(TextConfig(sources=(source,), tokens="bpe", vocab_size=300), tmp_path / "out")
    assert "".join(seen) == found.tokenizer.decode(found.train[:-1])
    monkeypatch.setattr(prepare, "_SAMPLE", 1000)
    seen.clear()
    prepare_tokens(TextConfig(sources=(source,), tokens="bpe", vocab_size=258), tmp_path / "less")
    assert len("".join(seen)) == 1000


def test_limit(tmp_path: Path) -> None:
    sources = tuple(write(tmp_path / f"{name}.txt", prose(600, name)) for name in "ab")
    found = prepare_tokens(TextConfig(sources=sources, limit=9000), tmp_path / "out")
    assert [part.characters for part in found.counts] == [9000, 9000]
    assert len(found.validation) > 0


def test_batches_of_the_encoder_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TextConfig(sources=(write(tmp_path / "a.txt", prose(300)),))
    at_once = prepare_tokens(config, tmp_path / "at-once")
    monkeypatch.setattr(prepare, "_BATCH", 1)
    assert prepare_tokens(config, tmp_path / "one-by-one").sha256 == at_once.sha256


def test_large_files_are_read_in_blocks_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TextConfig(sources=(write(tmp_path / "a.txt", prose(300)),))
    monkeypatch.setattr("einlinear_lab.data.text.sources._BLOCK", 1000)
    found = prepare_tokens(config, tmp_path / "out")
    assert 10 < found.counts[0].documents < 15
    together = found.tokenizer.decode(found.train) + found.tokenizer.decode(found.validation)
    assert {*together.split("\n")} == {*prose(300).split("\n")}


def test_progress_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", prose(300))
    told: list[tuple[str, int, int | None]] = []
    prepare_tokens(TextConfig(sources=(source,)), tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == [(source, len(prose(300)) - 1, len(prose(300)))]


def test_a_text_that_is_there_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", prose(300))
    config = TextConfig(sources=(source,))
    first = prepare_tokens(config, tmp_path / "out")
    (tmp_path / "a.txt").unlink()  # no longer needed
    assert prepare_tokens(config, tmp_path / "out").sha256 == first.sha256
    with pytest.raises(ValueError, match=r"with another config: validation was 0\.05, now 0\.1\. Name another"):
        prepare_tokens(TextConfig(sources=(source,), validation=0.1), tmp_path / "out")
    write(tmp_path / "a.txt", prose(200, "new"))
    assert prepare_tokens(config, tmp_path / "out", fresh=True).sha256 != first.sha256


@pytest.mark.parametrize("kind", ["char", pytest.param("bpe", marks=needs("tokenizers"))])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], r"a0\.txt: no text is left to prepare \(documents: 1, all of them empty"),
        (["", "\n\n"], r"a0\.txt, .*a1\.txt: no text is left to prepare \(documents: 2, all"),
        (
            ["too short"],
            r"a0\.txt: 9 characters are too few to hold out 0\.05 of them; give more text or a larger --val",
        ),
    ],
)
def test_too_little_text(texts: list[str], message: str, kind: str, tmp_path: Path) -> None:
    sources = tuple(write(tmp_path / f"a{i}.txt", text) for i, text in enumerate(texts))
    vocab_size = 257 if kind == "bpe" else None
    with pytest.raises(ValueError, match=message):
        prepare_tokens(TextConfig(sources=sources, tokens=kind, vocab_size=vocab_size), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_in_96_characters(tmp_path: Path) -> None:
    config = TextConfig(sources=(write(tmp_path / "a.txt", "漢字だけの文書\n" * 1000),), tokens="char")
    with pytest.raises(
        ValueError, match=r"documents: 1, .* more than 1 % .* outside the 96 \(--tokens bytes and bpe take any\)"
    ):
        prepare_tokens(config, tmp_path / "out")


@needs("tokenizers")
def test_a_vocabulary_too_large_for_the_text(tmp_path: Path) -> None:
    config = TextConfig(sources=(write(tmp_path / "a.txt", prose(300)),), tokens="bpe")
    with pytest.raises(ValueError, match=r"vocab_size 4096 is too large: this text has no more than \d+ tokens"):
        prepare_tokens(config, tmp_path / "out")


@pytest.mark.parametrize("kind", ["char", pytest.param("bpe", marks=needs("tokenizers"))])
def test_a_file_that_is_not_utf8(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(prose(300).encode() + "café".encode("latin1"))
    config = TextConfig(sources=(str(tmp_path / "a.txt"),), tokens=kind)
    with pytest.raises(
        ValueError, match=r"a\.txt is not UTF-8 text \(it has the byte 0xe9 where none may be\); convert"
    ):
        prepare_tokens(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_is_given_twice(tmp_path: Path) -> None:
    inner = write(tmp_path / "texts" / "a.txt", prose(300))
    for sources, message in (
        ((inner, inner), r"a\.txt is given twice"),
        ((inner, str(tmp_path / "texts")), r"a\.txt is given twice, the second time as a part of .*texts"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_tokens(TextConfig(sources=sources), tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ()}, "name at least one text"),
        ({"tokens": "word"}, "tokens must be auto, char, bytes or bpe, not 'word'"),
        ({"vocab_size": 300}, "vocab_size=300 is for bpe; the characters are always 96"),
        ({"tokens": "bpe", "vocab_size": 100}, "vocab_size 100 is too small"),
        ({"tokens": "bpe", "vocab_size": 0}, "vocab_size 0 is too small"),
        ({"tokens": "bpe", "vocab_size": 100_000}, "vocab_size 100000 is too large"),
        ({"validation": 0.0}, "validation=0.0: it must be more than 0 and at most 0.5"),
        ({"validation": 0.6}, "validation=0.6"),
        ({"limit": 0}, "limit=0: it must be at least 1 character"),
    ],
)
def test_configs_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TextConfig(**{"sources": ("a.txt",)} | wrong)
