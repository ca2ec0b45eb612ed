"""Tokenizers: round trips, and the text that they refuse."""

import json

import numpy as np
import pytest
from tests.lab.data.samples import needs, prose

from einlinear_lab.data.text.tokenizer import CHARACTERS, BPETokenizer, CharTokenizer, CleanText, to_characters


def test_the_96_characters_and_back() -> None:
    assert len(CHARACTERS) == len(set(CHARACTERS)) == CharTokenizer.vocab_size == 96
    assert {*CHARACTERS} == {"\n", *map(chr, range(0x20, 0x7F))}
    (tokens,) = CharTokenizer().encode([CHARACTERS])
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == list(range(96))
    assert CharTokenizer().decode(tokens) == CHARACTERS
    assert CharTokenizer().decode(CharTokenizer().end) == "\n\n"


@pytest.mark.parametrize("wrong", ["é", "\t", "\x7f", "漢"])
def test_characters_refuse_others(wrong: str) -> None:
    with pytest.raises(ValueError, match="is none of the 96 characters"):
        CharTokenizer().encode(["fine", f"a{wrong}"])


@pytest.mark.parametrize("wrong", [96, -1])
def test_numbers_that_are_no_tokens(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is no token: tokens are 0 to 95"):
        CharTokenizer().decode([1, wrong])


def test_likenesses_are_counted() -> None:
    assert to_characters("plain\ntext ~") == CleanText("plain\ntext ~")
    assert to_characters("“Naïve” café – it’s…") == CleanText('"Naive" cafe - it\'s...', replaced=7)
    assert to_characters("cafe\u0301") == CleanText("cafe", replaced=1)  # an accent of its own
    assert to_characters("a\tb\xa0c") == CleanText("a    b c", replaced=2)
    assert to_characters("ﬁve Ærø ½") == CleanText("five AEro 1/2", replaced=4)
    mostly = "a" * 199
    assert to_characters(mostly + "漢\x00") == CleanText(mostly, dropped=2)
    assert to_characters(mostly + "漢\x00é") == CleanText(mostly + "e", replaced=1, dropped=2)


def test_a_document_of_other_characters_is_dropped() -> None:
    assert to_characters("a" * 99 + "漢") is not None
    assert to_characters("a" * 98 + "漢") is None
    assert to_characters("漢字だけの文書") is None
    assert to_characters("Ελληνικά") is None


@pytest.fixture(scope="module")
def pairs() -> BPETokenizer:
    return BPETokenizer.train(prose(400).splitlines(keepends=True), 300)


@needs("tokenizers")
def test_byte_pairs_and_back(pairs: BPETokenizer) -> None:
    texts = [prose(3), "", "  漢字 é \t\x00 \U0001f600\n\n", "<|endoftext|>"]
    found = pairs.encode(texts)
    assert [pairs.decode(tokens) for tokens in found] == texts
    assert found[0].dtype == np.dtype("<u2")
    assert len(found[0]) < len(texts[0]) * 0.7
    assert all(tokens.max(initial=0) < 300 for tokens in found)
    assert pairs.vocab_size == 300
    assert pairs.decode(pairs.end) == "<|endoftext|>"
    assert pairs.end[0] not in found[3], "a document that spells out its end does not end there"


@needs("tokenizers")
def test_byte_pairs_are_the_same_every_time_and_from_their_file(pairs: BPETokenizer) -> None:
    again = BPETokenizer.train(prose(400).splitlines(keepends=True), 300)
    assert again.content == pairs.content
    read = BPETokenizer(pairs.content)
    assert read.encode([prose(5)])[0].tolist() == pairs.encode([prose(5)])[0].tolist()
    assert read.end.tolist() == pairs.end.tolist()


@needs("tokenizers")
def test_byte_pairs_of_every_byte_alone() -> None:
    pairs = BPETokenizer.train(["any text"], 257)
    assert pairs.decode(pairs.encode(["é漢"])[0]) == "é漢"


@needs("tokenizers")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "vocab_size 256 is too small: the 256 bytes"),
        (65_537, "vocab_size 65537 is too large: tokens are stored in two bytes, which count 65,536"),
        (5000, r"vocab_size 5000 is too large: this text has no more than \d+ tokens to offer"),
    ],
)
def test_sizes_that_byte_pairs_cannot_have(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train([prose(50)], size)


@pytest.mark.parametrize("content", ["", "{}", "[]", json.dumps({"model": {"vocab": {"a": 0}}})])
def test_what_is_no_tokenizer(content: str) -> None:
    with pytest.raises(ValueError, match=r"this is no byte-pair encoding with the token <\|endoftext\|>"):
        BPETokenizer(content)


@needs("tokenizers")
def test_pairs_that_occur_once_are_no_tokens() -> None:
    with pytest.raises(ValueError, match="this text has no more than 257 tokens to offer"):
        BPETokenizer.train(["abcdefg"], 258)
