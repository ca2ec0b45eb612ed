"""Preparation of text for language models: from documents to tokens on disk, a share of them held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

from einlinear.files import differences
from einlinear_lab.data.rows import NotText
from einlinear_lab.data.text.sources import NAMES, Corpus, name_of, read_text
from einlinear_lab.data.text.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    CleanText,
    Tokenizer,
    check_bpe_size,
    first_dropped,
    to_characters,
)
from einlinear_lab.data.text.tokens import (
    DESCRIPTION,
    TRAIN,
    VALIDATION,
    CorpusCounts,
    Tokens,
    TokenWriter,
    load_tokens,
)

# Called with the current work, the characters done, and their total if known.
Progress = Callable[[str, int, int | None], None]

# Characters where they suffice, else bytes.
AUTO = "auto"
# In characters: of a document that go to the same split; a byte-pair encoding is trained on; are encoded at a time.
_PIECE, _SMALLEST_PIECE = 1 << 15, 256
_SAMPLE = 100_000_000
_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Config of a prepared text.

    Attributes:
        sources: as for `read_text`.
        tokens: "char", "bytes", "bpe", or "auto": characters, or bytes where the 96 characters cannot express a text of
            the user's. English and code are always characters.
        vocab_size: of a byte-pair encoding, 4,096 if None; characters are always 96, bytes 256.
        validation: share of the text that is held out: of each corpus, cut at line ends, the middle one of every
            1 / validation pieces in a row. Pieces have about 32,768 characters, fewer in a small corpus.
        limit: largest number of characters of each corpus. Default: all.

    Raises:
        ValueError: a value out of range.
    """

    sources: tuple[str, ...]
    tokens: str = AUTO
    vocab_size: int | None = None
    validation: float = 0.05
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("name at least one text")
        if self.tokens == AUTO and {*self.sources} <= {*NAMES}:
            object.__setattr__(self, "tokens", CharTokenizer.kind)
        if self.tokens == "bpe":
            object.__setattr__(self, "vocab_size", 4096 if self.vocab_size is None else self.vocab_size)
            check_bpe_size(self.vocab_size or 0)
        elif self.tokens not in (AUTO, CharTokenizer.kind, ByteTokenizer.kind):
            raise ValueError(f"tokens must be auto, char, bytes or bpe, not {self.tokens!r}")
        elif self.vocab_size is not None:
            fixed = "bytes are always 256" if self.tokens == ByteTokenizer.kind else "characters are always 96"
            raise ValueError(f"vocab_size={self.vocab_size} is for bpe; the {fixed}")
        if not 0 < self.validation <= 0.5:
            raise ValueError(f"validation={self.validation}: it must be more than 0 and at most 0.5")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: it must be at least 1 character")


def load_prepared(config: TextConfig, folder: str | Path) -> Tokens | None:
    """Return the prepared text of a folder, None if it holds none yet. Raises ValueError for that of another config."""
    folder = Path(folder).expanduser()
    if not (folder / DESCRIPTION).exists():
        return None
    tokens = load_tokens(folder)
    if config.tokens == AUTO and tokens.config.get("tokens") in (CharTokenizer.kind, ByteTokenizer.kind):
        config = replace(config, tokens=tokens.config["tokens"])
    if changed := differences(tokens.config, _to_json(config)):
        raise ValueError(
            f"{folder} holds a text that was prepared with another config: {'; '.join(changed)}. Name another folder, "
            "or give --fresh to replace it"
        )
    return tokens


def prepare_tokens(
    config: TextConfig, folder: str | Path, *, fresh: bool = False, progress: Progress = lambda *_: None
) -> Tokens:
    """Write the tokens of a text into a folder, and open them; after an interruption, start over.

    Args:
        config: of the text.
        folder: created if it is absent. A folder that holds the text already is left as it is.
        fresh: prepare a text again that the folder holds, and replace it at the end.
        progress: called as the work goes on.

    Raises:
        ValueError: a text that cannot be read, is empty or too short to hold out any of it; a vocabulary that is too
            large for it; a folder that holds other files.
        OSError: a text that is out of reach, a full disk, another process that prepares a text in the folder.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from einlinear_lab.data import TextConfig, prepare_tokens
        >>> with TemporaryDirectory() as folder:
        ...     text = Path(folder) / "numbers.txt"
        ...     _ = text.write_text("one two three four\\n" * 1000)
        ...     tokens = prepare_tokens(TextConfig(sources=(str(text),)), Path(folder) / "tokens")
        ...     print(tokens.train.shape, tokens.validation.shape, tokens.tokenizer.decode(tokens.train[:7]))
        (17975,) (1026,) one two
    """
    folder = Path(folder).expanduser()
    if not fresh and (tokens := load_prepared(config, folder)):
        return tokens
    corpora = _read_corpora(config)
    try:
        _write(config, corpora, folder, progress)
    except NotText as error:
        if config.tokens != AUTO:
            raise ValueError(f"{error}; or take its bytes as they are: --tokens bytes") from None
        _write(replace(config, tokens=ByteTokenizer.kind), corpora, folder, progress, str(error))
    return load_tokens(folder)


def cut(text: str, length: int) -> list[str]:
    """Cut a text into pieces of about this length, at line ends where there are any nearby."""
    count = max(1, round(len(text) / length))
    edges = [0]
    for i in range(1, count):
        place = i * len(text) // count
        newline = text.find("\n", place, place + length // 2)
        edges.append(place if newline < 0 else newline + 1)
    return [text[start:end] for start, end in pairwise([*edges, len(text)])]


def _to_json(config: TextConfig) -> dict[str, Any]:
    """Return a config as JSON values, its files by their full paths."""
    return asdict(config) | {"sources": [name_of(source) for source in config.sources]}


def _read_corpora(config: TextConfig) -> list[Corpus]:
    """Return all corpora. Raises ValueError where one is in another: its validation text would be trained on."""
    corpora = [corpus for source in config.sources for corpus in read_text(source)]
    for corpus, other in permutations(corpora, 2):
        if corpus.name == other.name:
            raise ValueError(f"{corpus.name} is given twice")
        if Path(other.name) in Path(corpus.name).parents:
            raise ValueError(f"{corpus.name} is given twice, the second time as a part of {other.name}")
    return corpora


def _write(config: TextConfig, corpora: list[Corpus], folder: Path, progress: Progress, fallback: str = "") -> None:
    """Raises NotText where the text has to be encoded as bytes."""
    counts = [CorpusCounts(corpus.name, corpus.origin, fallback=fallback) for corpus in corpora]
    with TokenWriter(folder) as writer:
        tokenizer = _tokenizer(config, corpora, progress)
        for corpus, count in zip(corpora, counts, strict=True):
            _encode(_pieces(corpus, config, count, partial(progress, corpus.name)), count, tokenizer, writer)
        _check(config, counts)
        resolved = replace(config, tokens=CharTokenizer.kind) if config.tokens == AUTO else config
        writer.finish(tokenizer, counts, _to_json(resolved))


def _tokenizer(config: TextConfig, corpora: list[Corpus], progress: Progress) -> Tokenizer:
    if config.tokens in (AUTO, CharTokenizer.kind):
        return CharTokenizer()
    if config.tokens == ByteTokenizer.kind:
        return ByteTokenizer()
    counts = CorpusCounts("", "")
    texts = _sample(config, corpora, counts, progress)
    if not (first := next(texts, "")):
        _check(config, [counts])
    return BPETokenizer.train(chain([first], texts), config.vocab_size or 0)


def _sample(config: TextConfig, corpora: list[Corpus], counts: CorpusCounts, progress: Progress) -> Iterator[str]:
    """Yield the beginning of the training text, on which a tokenizer is trained."""
    rest = _SAMPLE
    for corpus in corpora:
        for piece in _pieces(corpus, config, counts, partial(progress, f"tokenizer: {corpus.name}")):
            if rest <= 0:
                break
            if piece.split == TRAIN:
                yield piece.text[:rest]
                rest -= len(piece.text)
    progress("tokenizer: pairs", 0, None)


class _Piece(NamedTuple):
    """A stretch of a document in one split; `ends` says whether it is the last one of its document."""

    text: str
    split: str
    ends: bool


def _encode(pieces: Iterator[_Piece], counts: CorpusCounts, tokenizer: Tokenizer, writer: TokenWriter) -> None:
    """Write the tokens of a corpus, in batches: a tokenizer may encode a batch on all cores."""
    totals = {TRAIN: 0, VALIDATION: 0}
    for first in pieces:
        batch, size = [first], len(first.text)
        while size < _BATCH and (piece := next(pieces, None)):
            batch.append(piece)
            size += len(piece.text)
        for piece, tokens in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
            for array in (tokens, tokenizer.end) if piece.ends else (tokens,):
                writer.add(piece.split, array)
                totals[piece.split] += len(array)
    counts.train_tokens, counts.validation_tokens = totals[TRAIN], totals[VALIDATION]


def _pieces(
    corpus: Corpus, config: TextConfig, counts: CorpusCounts, progress: Callable[[int, int | None], None]
) -> Iterator[_Piece]:
    """Yield the pieces of a corpus in order, and add its documents to `counts` as they are read."""
    clean = to_characters if config.tokens in (AUTO, CharTokenizer.kind) else CleanText
    documents = corpus.raw or corpus.documents if config.tokens == ByteTokenizer.kind else corpus.documents
    total = min((size for size in (corpus.size, config.limit) if size is not None), default=None)
    length = _PIECE if total is None else min(_PIECE, max(_SMALLEST_PIECE, total // 100))
    every = round(1 / config.validation)
    read = number = 0
    for document in documents():
        text = document.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        if config.limit is not None:
            text = text[: config.limit - read]
        read += len(text)
        cleaned = clean(text) if text else None
        if config.tokens == AUTO and text and (cleaned is None or cleaned.dropped):
            raise NotText(
                f"{corpus.name} has the character {first_dropped(text) or ''!r}, and the 96 characters have none like "
                "it (bpe takes any)"
            )
        counts.documents += 1
        if cleaned is None:
            counts.documents_dropped += 1
            counts.characters_dropped += len(text)
        else:
            counts.characters += len(cleaned.text)
            counts.characters_replaced += cleaned.replaced
            counts.characters_dropped += cleaned.dropped
            pieces = cut(cleaned.text, length)
            for i, piece in enumerate(pieces, start=1):
                yield _Piece(piece, VALIDATION if number % every == every // 2 else TRAIN, i == len(pieces))
                number += 1
        progress(read, total)
        if read == config.limit:
            return


def _check(config: TextConfig, counts: list[CorpusCounts]) -> None:
    characters = sum(one.characters for one in counts)
    sources = ", ".join(config.sources)
    if not characters:
        reason = f"documents: {sum(one.documents for one in counts)}, all of them empty"
        if config.tokens == CharTokenizer.kind:
            reason += " or with more than 1 % of their characters outside the 96 (--tokens bytes and bpe take any)"
        raise ValueError(f"{sources}: no text is left to prepare ({reason})")
    if not (any(one.train_tokens for one in counts) and any(one.validation_tokens for one in counts)):
        raise ValueError(
            f"{sources}: {characters:,} characters are too few to hold out {config.validation:.2g} of them; give more "
            "text or a larger --validation"
        )
