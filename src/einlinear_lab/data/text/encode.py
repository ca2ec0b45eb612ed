"""From text to tokens and back: characters, bytes, or a byte-pair encoding."""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # of an extra; imported where it is used
    from tokenizers import Tokenizer

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # token i is the character i
LARGEST_VOCABULARY = 2**16  # what two bytes can count
_END = "<|endoftext|>"
_SMALLEST_BPE = 256 + 1  # every byte, and the end of a document
_MOST_DROPPED = 0.01

_OUTSIDE = re.compile(r"[^\n -~]")
_LOOKALIKES = {
    **dict.fromkeys("‘’‚‛′´", "'"),
    **dict.fromkeys("“”„‟″", '"'),
    **dict.fromkeys("‐‑‒–−", "-"),
    **dict.fromkeys("—―", "--"),
    **{
        "…": "...",
        "•": "*",
        "·": "*",
        "\t": "    ",
        "\f": "\n",
        "\v": "\n",
        "\x85": "\n",
        "\u2028": "\n",
        "\u2029": "\n\n",
    },
    **{"Æ": "AE", "æ": "ae", "Œ": "OE", "œ": "oe", "Ø": "O", "ø": "o", "ß": "ss", "Ł": "L", "ł": "l", "ı": "i"},
    **{"×": "x", "⁄": "/", "«": '"', "»": '"', "‹": "<", "›": ">", "µ": "u", "©": "(c)", "®": "(R)", "™": "(TM)"},
}


@dataclass(frozen=True)
class Cleaned:
    """A document as a vocabulary takes it.

    Attributes:
        text: what is left of it.
        replaced: characters that became others, such as a curly quote a straight one.
        dropped: characters that have no counterpart.
    """

    text: str
    replaced: int = 0
    dropped: int = 0


def to_characters(text: str) -> Cleaned | None:
    """A document in the 96 characters, or None where too much would be lost.

    A character outside becomes its likeness, such as e for é, or is dropped where it has none. If more than 1 % of
    a document would be dropped, it is no text in these characters, and the result is None.
    """
    outside = Counter(_OUTSIDE.findall(text))
    if not outside:
        return Cleaned(text)
    text = unicodedata.normalize("NFC", text)  # an accent of its own joins its letter
    outside = Counter(_OUTSIDE.findall(text))
    dropped = sum(count for character, count in outside.items() if not _likeness(character))
    if dropped > _MOST_DROPPED * len(text):
        return None
    return Cleaned(
        text.translate({ord(character): _likeness(character) for character in outside}),
        outside.total() - dropped,
        dropped,
    )


def outside(text: str) -> str | None:
    """The first character of a text that the 96 characters have no likeness of."""
    found = (character for character in _OUTSIDE.findall(unicodedata.normalize("NFC", text)))
    return next((character for character in found if not _likeness(character)), None)


def unchanged(text: str) -> Cleaned:
    """A document for a vocabulary of bytes: any text will do."""
    return Cleaned(text)


@cache
def _likeness(character: str) -> str:
    """What stands for a character in the 96, "" if nothing does."""
    if character in _LOOKALIKES:
        return _LOOKALIKES[character]
    parts = unicodedata.normalize("NFKD", character)
    return "".join(_LOOKALIKES.get(part, _OUTSIDE.sub("", part)) for part in parts)


def dtype_of(size: int) -> np.dtype[Any]:
    """How tokens of a vocabulary of this size are stored: in one byte, or in two, the lower one first."""
    return np.dtype("u1" if size <= 256 else "<u2")


class Vocabulary(ABC):
    """The tokens of a prepared text.

    Attributes:
        kind: "char", "bytes" or "bpe".
        size: how many tokens there are.
        end: what follows every document, a few tokens.
    """

    kind: ClassVar[str]
    size: int
    end: npt.NDArray[Any]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Texts, cleaned as for this vocabulary, -> the tokens of each, of dtype `dtype_of(size)`."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens -> text. Raises ValueError for a number that is no token."""

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        found = [int(token) for token in tokens]
        wrong = [token for token in found if not 0 <= token < self.size]
        if wrong:
            raise ValueError(f"{wrong[0]} is no token of a vocabulary of {self.size}")
        return found


class Characters(Vocabulary):
    """The 95 printable characters of ASCII and the newline. A document ends with an empty line."""

    kind = "char"
    size = len(CHARACTERS)

    def __init__(self) -> None:
        self._token = np.zeros(128, np.uint8)  # of each byte
        self._token[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(self.size)
        (self.end,) = self.encode(["\n\n"])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        for outside in filter(None, map(_OUTSIDE.search, texts)):
            raise ValueError(f"{outside[0]!r} is none of the {self.size} characters of this vocabulary")
        return [self._token[np.frombuffer(text.encode(), np.uint8)] for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(CHARACTERS[token] for token in self._checked(tokens))


class Bytes(Vocabulary):
    """The bytes of UTF-8: any text can be encoded, and any file. A document ends with an empty line."""

    kind = "bytes"
    size = 256

    def __init__(self) -> None:
        (self.end,) = self.encode(["\n\n"])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Bytes that are no UTF-8 are what `open(..., errors="surrogateescape")` makes of them."""
        return [np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(self._checked(tokens)).decode("utf-8", "replace")


class BytePairs(Vocabulary):
    """A byte-pair encoding: any text can be encoded. A token of its own ends a document.

    Args:
        content: the tokenizer as JSON, as the tokenizers library writes it.

    Raises:
        ValueError: the content is no byte-pair encoding, or lacks the token that ends a document.
    """

    kind = "bpe"

    def __init__(self, content: str) -> None:
        self.content = content
        try:
            tokens = json.loads(content)["model"]["vocab"]
            end = tokens[_END]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"this is no byte-pair encoding with the token {_END}: {error!r}") from None
        self.size = len(tokens)
        self.end = np.array([end], dtype_of(self.size))

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BytePairs:
        """The encoding of `size` tokens that suits the texts, the same one every time.

        Raises:
            ValueError: more tokens than the texts have pairs that occur twice, or a size outside 257 to 65,536.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        check_bpe_size(size)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab_size()
        if found < size:
            raise ValueError(f"vocabulary {size} is too large: this text has no more than {found} tokens to offer")
        return cls(tokenizer.to_str())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.content)
        tokenizer.encode_special_tokens = True  # a text that spells out the end of a document does not end it
        return tokenizer

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        dtype = dtype_of(self.size)
        return [np.array(found.ids, dtype) for found in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(self._checked(tokens), skip_special_tokens=False)


def check_bpe_size(size: int) -> None:
    """Raise ValueError for a number of tokens that no byte-pair encoding here has."""
    if size < _SMALLEST_BPE:
        raise ValueError(f"vocabulary {size} is too small: the 256 bytes and the end of a document are tokens already")
    if size > LARGEST_VOCABULARY:
        raise ValueError(f"vocabulary {size} is too large: tokens are stored in two bytes, which count {2**16:,}")
