"""Tokenizers: characters, bytes, or a byte-pair encoding."""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

# Token i is the character i.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_END = "<|endoftext|>"
_MOST_DROPPED = 0.01

_OUTSIDE = re.compile(r"[^\n -~]")
_REPLACEMENTS = {
    **dict.fromkeys("‘’‚‛′´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **dict.fromkeys("•·", "*"),
    **dict.fromkeys("\f\v\x85\u2028", "\n"),
    **{"\u2029": "\n\n", "\t": "    ", "…": "...", "×": "x", "⁄": "/", "‹": "<", "›": ">", "µ": "u"},
    **{"Æ": "AE", "æ": "ae", "Œ": "OE", "œ": "oe", "Ø": "O", "ø": "o", "ß": "ss", "Ł": "L", "ł": "l", "ı": "i"},
    **{"©": "(c)", "®": "(R)", "™": "(TM)"},
}


@dataclass(frozen=True)
class CleanText:
    """A document whose characters a tokenizer has, and how many others were replaced by similar ones or dropped."""

    text: str
    replaced: int = 0
    dropped: int = 0


def to_characters(text: str) -> CleanText | None:
    """Replace or drop all but the 96 characters of a document; None if more than 1 % of it would be dropped."""
    if not _OUTSIDE.search(text):
        return CleanText(text)
    # A combining accent joins its letter.
    text = unicodedata.normalize("NFC", text)
    outside = Counter(_OUTSIDE.findall(text))
    dropped = sum(count for character, count in outside.items() if not _replacement(character))
    if dropped > _MOST_DROPPED * len(text):
        return None
    table = {ord(character): _replacement(character) for character in outside}
    return CleanText(text.translate(table), outside.total() - dropped, dropped)


def first_dropped(text: str) -> str | None:
    characters = _OUTSIDE.findall(unicodedata.normalize("NFC", text))
    return next((character for character in characters if not _replacement(character)), None)


@cache
def _replacement(character: str) -> str:
    """Return the similar characters among the 96; "" if there are none."""
    if character in _REPLACEMENTS:
        return _REPLACEMENTS[character]
    parts = unicodedata.normalize("NFKD", character)
    return "".join(_REPLACEMENTS.get(part, _OUTSIDE.sub("", part)) for part in parts)


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype in which tokens are stored: one byte, or two bytes in little-endian order."""
    return np.dtype("u1" if vocab_size <= 256 else "<u2")


class Tokenizer(ABC):
    """Encodes text as tokens and decodes tokens; `end` are those that follow every document."""

    kind: ClassVar[str]
    vocab_size: int
    end: npt.NDArray[Any]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Encode texts, each as an array of dtype `dtype_of(vocab_size)`."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode tokens. Raises ValueError for a number that is no token."""
        ids = [int(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{token} is no token: tokens are 0 to {self.vocab_size - 1}")
        return self._decode(ids)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class CharTokenizer(Tokenizer):
    """The 95 printable characters of ASCII and the newline. A document ends with an empty line."""

    kind = "char"
    vocab_size = len(CHARACTERS)

    def __init__(self) -> None:
        # The token of each byte.
        self._tokens = np.zeros(128, np.uint8)
        self._tokens[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(self.vocab_size)
        (self.end,) = self.encode(["\n\n"])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        for outside in filter(None, map(_OUTSIDE.search, texts)):
            raise ValueError(f"{outside[0]!r} is none of the {self.vocab_size} characters of this tokenizer")
        return [self._tokens[np.frombuffer(text.encode(), np.uint8)] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return "".join(CHARACTERS[token] for token in ids)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, which encode any text and any file. A document ends with an empty line."""

    kind = "bytes"
    vocab_size = 256

    def __init__(self) -> None:
        (self.end,) = self.encode(["\n\n"])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Bytes that are not UTF-8 are as `open(..., errors="surrogateescape")` returns them."""
        return [np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class BPETokenizer(Tokenizer):
    """A byte-pair encoding, from the JSON of the tokenizers library. A document ends with a token of its own."""

    kind = "bpe"

    def __init__(self, content: str) -> None:
        self.content = content
        try:
            tokens = json.loads(content)["model"]["vocab"]
            end = tokens[_END]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"this is no byte-pair encoding with the token {_END}: {error!r}") from None
        self.vocab_size = len(tokens)
        self.end = np.array([end], dtype_of(self.vocab_size))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        check_bpe_size(vocab_size)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[_END],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if (size := tokenizer.get_vocab_size()) < vocab_size:
            raise ValueError(f"vocab_size {vocab_size} is too large: this text has no more than {size} tokens to offer")
        return cls(tokenizer.to_str())

    @cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self.content)
        # A text that spells out the end of a document does not end it.
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        dtype = dtype_of(self.vocab_size)
        return [np.array(encoding.ids, dtype) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def check_bpe_size(size: int) -> None:
    if size < 256 + 1:
        raise ValueError(f"vocab_size {size} is too small: the 256 bytes and the end of a document are tokens already")
    if size > 2**16:
        raise ValueError(f"vocab_size {size} is too large: tokens are stored in two bytes, which count {2**16:,}")
