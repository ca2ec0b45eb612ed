"""From a text to its tokens on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise, permutations
from pathlib import Path
from typing import Any

from einlinear.files import differences
from einlinear_lab.data.rows import NotText
from einlinear_lab.data.text.encode import (
    BytePairs,
    Bytes,
    Characters,
    Vocabulary,
    check_bpe_size,
    outside,
    to_characters,
    unchanged,
)
from einlinear_lab.data.text.part import Part
from einlinear_lab.data.text.read import NAMES, name_of, read_text
from einlinear_lab.data.text.tokens import DESCRIPTION, TRAIN, VALIDATION, Counts, Tokens, load_tokens
from einlinear_lab.data.text.writer import Writer

Progress = Callable[[str, int, int | None], None]  # what is being done; characters done, and of how many, if known

AUTO = "auto"  # characters where they suffice, else bytes
_PIECE = 1 << 15  # characters of a document that go to the same split
_SMALLEST_PIECE = 256
_SAMPLE = 100_000_000  # characters that a byte-pair encoding is trained on, at most
_BATCH = 1 << 20  # characters that are encoded at a time


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to prepare, and how.

    Attributes:
        sources: as for `read_text`.
        tokens: "char", "bytes", "bpe", or "auto": characters, unless the 96 cannot express a text of the user's, then
            bytes. English and code are always characters.
        vocabulary: tokens of a byte-pair encoding, 4,096 if None; the characters are always 96.
        validation: share of the text that is held out. Documents are cut at line ends into pieces of about 32,768
            characters, or in a small part of the text of a hundredth of it, but of no fewer than 256. In each part, one
            of every 1 / validation pieces in a row is held out, the middle one.
        limit: take at most this many characters of each part of the text. Default: all.

    Raises:
        ValueError: a value out of range.
    """

    sources: tuple[str, ...]
    tokens: str = "auto"
    vocabulary: int | None = None
    validation: float = 0.05
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("name at least one text")
        if self.tokens == AUTO and {*self.sources} <= {*NAMES}:
            object.__setattr__(self, "tokens", Characters.kind)
        if self.tokens == "bpe":
            object.__setattr__(self, "vocabulary", 4096 if self.vocabulary is None else self.vocabulary)
            check_bpe_size(self.vocabulary or 0)
        elif self.tokens not in (AUTO, Characters.kind, Bytes.kind):
            raise ValueError(f"tokens must be auto, char, bytes or bpe, not {self.tokens!r}")
        elif self.vocabulary is not None:
            always = "bytes are always 256" if self.tokens == Bytes.kind else "characters are always 96"
            raise ValueError(f"a vocabulary of {self.vocabulary} is for bpe; the {always}")
        if not 0 < self.validation <= 0.5:
            raise ValueError(f"validation={self.validation}: it must be more than 0 and at most 0.5")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: it must be at least 1 character")


def finished(recipe: Recipe, folder: str | Path) -> Tokens | None:
    """The prepared text of a folder; None if it holds none yet.

    Raises:
        ValueError: it was prepared by another recipe, or it is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / DESCRIPTION).exists():
        return None
    tokens = load_tokens(folder)
    if recipe.tokens == AUTO and tokens.recipe.get("tokens") in (Characters.kind, Bytes.kind):
        recipe = replace(recipe, tokens=tokens.recipe["tokens"])
    changed = differences(tokens.recipe, _values(recipe))
    if changed:
        raise ValueError(
            f"{folder} holds a text that was prepared otherwise: {'; '.join(changed)}. Name another folder, or give "
            "--fresh to replace it"
        )
    return tokens


def prepare_tokens(
    recipe: Recipe, folder: str | Path, *, fresh: bool = False, progress: Progress = lambda *_: None
) -> Tokens:
    """Write the tokens of a text into a folder, and open them.

    Interrupted or killed, it leaves nothing that can be mistaken for a prepared text; called again, it starts over. A
    folder that holds the text already is left as it is.

    Args:
        recipe: what to prepare.
        folder: created if it is absent.
        fresh: prepare the text again although it is there, and replace it when done.
        progress: called as the work goes on.

    Raises:
        ValueError: a text that cannot be read, is empty or too short to hold out any of it; a vocabulary that is too
            large for it; a folder that holds something else.
        OSError: a text that is out of reach, a full disk, another process that prepares a text in the folder.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from einlinear_lab.data import Recipe, prepare_tokens
        >>> with TemporaryDirectory() as folder:
        ...     text = Path(folder) / "numbers.txt"
        ...     _ = text.write_text("one two three four\\n" * 1000)
        ...     tokens = prepare_tokens(Recipe(sources=(str(text),)), Path(folder) / "tokens")
        ...     print(tokens.train.shape, tokens.validation.shape, tokens.vocabulary.decode(tokens.train[:7]))
        (17975,) (1026,) one two
    """
    folder = Path(folder).expanduser()
    if not fresh and (found := finished(recipe, folder)):
        return found
    parts = _read_parts(recipe)
    try:
        _write(recipe, parts, folder, progress)
    except NotText as error:
        if recipe.tokens != AUTO:
            raise ValueError(f"{error}; or take its bytes as they are: --tokens bytes") from None
        _write(replace(recipe, tokens=Bytes.kind), parts, folder, progress, str(error))
    return load_tokens(folder)


def _write(recipe: Recipe, parts: list[Part], folder: Path, progress: Progress, fallback: str = "") -> None:
    """Raises NotText where bytes are the only tokens, or those to fall back to."""
    with Writer(folder) as writer:
        vocabulary = _vocabulary(recipe, parts, progress)
        counts = [_encode(part, recipe, vocabulary, writer, progress) for part in parts]
        counts = [replace(part, fallback=fallback) for part in counts]
        _check(recipe, counts)
        resolved = replace(recipe, tokens=Characters.kind) if recipe.tokens == AUTO else recipe
        writer.finish(vocabulary, counts, _values(resolved))


def cut(text: str, length: int) -> list[str]:
    """Pieces of about this length, which end at line ends where there are any nearby. Together they are the text."""
    count = max(1, round(len(text) / length))
    edges = [0]
    for i in range(1, count):
        place = i * len(text) // count
        newline = text.find("\n", place, place + length // 2)
        edges.append(place if newline < 0 else newline + 1)
    return [text[start:end] for start, end in pairwise([*edges, len(text)])]


def _values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON values, its files by their full paths."""
    return asdict(recipe) | {"sources": [name_of(source) for source in recipe.sources]}


def _read_parts(recipe: Recipe) -> list[Part]:
    """All parts of the text. Raises ValueError where one is in another: its validation text would be trained on."""
    parts = [part for source in recipe.sources for part in read_text(source)]
    for part, other in permutations(parts, 2):
        if part.name == other.name:
            raise ValueError(f"{part.name} is given twice")
        if Path(other.name) in Path(part.name).parents:
            raise ValueError(f"{part.name} is given twice, the second time as a part of {other.name}")
    return parts


def _vocabulary(recipe: Recipe, parts: list[Part], progress: Progress) -> Vocabulary:
    if recipe.tokens in (AUTO, Characters.kind):
        return Characters()
    if recipe.tokens == Bytes.kind:
        return Bytes()
    counts = Counts("", "")
    texts = _sample(recipe, parts, counts, progress)
    first = next(texts, "")
    if not first:
        _check(recipe, [counts])
    return BytePairs.train(chain([first], texts), recipe.vocabulary or 0)


def _sample(recipe: Recipe, parts: list[Part], counts: Counts, progress: Progress) -> Iterator[str]:
    """The beginning of the training text, as much of it as a tokenizer is trained on."""
    rest = _SAMPLE
    for part in parts:
        for piece in _pieces(part, recipe, counts, partial(progress, f"tokenizer: {part.name}")):
            if rest <= 0:
                break
            if piece.split == TRAIN:
                yield piece.text[:rest]
                rest -= len(piece.text)
    progress("tokenizer: pairs", 0, None)


def _encode(part: Part, recipe: Recipe, vocabulary: Vocabulary, writer: Writer, progress: Progress) -> Counts:
    """Write the tokens of a part."""
    counts = Counts(part.name, part.origin)
    tokens = {TRAIN: 0, VALIDATION: 0}
    for batch in _batches(_pieces(part, recipe, counts, partial(progress, part.name))):
        for piece, found in zip(batch, vocabulary.encode([piece.text for piece in batch]), strict=True):
            for some in (found, vocabulary.end) if piece.ends else (found,):
                writer.add(piece.split, some)
                tokens[piece.split] += len(some)
    return replace(counts, train_tokens=tokens[TRAIN], validation_tokens=tokens[VALIDATION])


@dataclass(frozen=True)
class _Piece:
    """A stretch of a document, all of one split; `ends` says whether the document ends with it."""

    text: str
    split: str
    ends: bool


def _pieces(
    part: Part, recipe: Recipe, counts: Counts, progress: Callable[[int, int | None], None]
) -> Iterator[_Piece]:
    """The pieces of a part, in their order. What becomes of its documents is added to `counts` as they are read."""
    clean = to_characters if recipe.tokens in (AUTO, Characters.kind) else unchanged
    documents = part.raw or part.documents if recipe.tokens == Bytes.kind else part.documents
    total = min((size for size in (part.size, recipe.limit) if size is not None), default=None)
    length = _PIECE if total is None else min(_PIECE, max(_SMALLEST_PIECE, total // 100))
    every = round(1 / recipe.validation)
    read = number = 0
    for document in documents():
        text = document.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        if recipe.limit is not None:
            text = text[: recipe.limit - read]
        read += len(text)
        cleaned = clean(text) if text else None
        if recipe.tokens == AUTO and text and (cleaned is None or cleaned.dropped):
            character = outside(text) or ""
            raise NotText(
                f"{part.name} has the character {character!r}, and the 96 characters have none like it (bpe takes any)"
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
        if read == recipe.limit:
            return


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces, as many at a time as an encoder takes at once: it may use all cores."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _check(recipe: Recipe, counts: list[Counts]) -> None:
    """Refuse a text of which too little is left."""
    characters = sum(part.characters for part in counts)
    if not characters:
        why = f"documents: {sum(part.documents for part in counts)}, all of them empty"
        if recipe.tokens == Characters.kind:
            why += " or with more than 1 % of their characters outside the 96 (--tokens bytes and bpe take any)"
        raise ValueError(f"{', '.join(recipe.sources)}: no text is left to prepare ({why})")
    if not all(sum(getattr(part, name) for part in counts) for name in ("train_tokens", "validation_tokens")):
        raise ValueError(
            f"{', '.join(recipe.sources)}: {characters:,} characters are too few to hold out {recipe.validation:.2g} "
            "of them; give more text or a larger --validation"
        )
