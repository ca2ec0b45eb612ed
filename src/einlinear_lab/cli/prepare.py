"""`einlinear prepare`: its options, and what it prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import interruptible, user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import numbers

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.data import Tokens


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="english (tools/fetch_english.sh fetches it), code (Python's standard library), openwebtext, "
            "hub:OWNER/NAME, a .jsonl, .json, .csv or .parquet file with a column text, a text file, or a folder of "
            ".txt files. Files may be compressed (.gz).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokens.")],
    tokens: Annotated[
        str,
        typer.Option(
            help="auto (characters, or bytes where a text of yours has others), char (96 characters), bytes (256) or "
            "bpe (byte pairs)."
        ),
    ] = "auto",
    vocab: Annotated[
        int | None, typer.Option(help="Size of the vocabulary of bpe, 257 to 65536. Default: 4096.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of each part of the text that is held out.")] = 0.05,
    limit: Annotated[
        str | None, typer.Option(help="Take at most this many characters of each part of the text, such as 500k or 2M.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prepare again a text that the folder holds.")] = False,
) -> None:
    """Turn text into tokens for language models, a share of them held out for validation.

    A text that the folder holds already is left as it is. After an interruption the same command starts over.
    """
    require(LAB)
    from einlinear_lab.data import Recipe, prepare_tokens
    from einlinear_lab.data.text.prepare import finished

    with user_errors(), interruptible(f"Interrupted. The same command prepares {out} from the start."):
        characters = numbers(limit, "--limit")
        if characters and len(characters) > 1:
            raise ValueError(f"--limit {limit}: give one number")
        recipe = Recipe(
            sources=tuple(sources),
            tokens=tokens,
            vocabulary=vocab,
            validation=validation,
            limit=characters[0] if characters else None,
        )
        found = None if fresh else finished(recipe, out)
        if found:
            display.note(f"{out} holds this text already; --fresh prepares it again.")
        else:
            with display.progress() as progress:
                found = prepare_tokens(recipe, out, fresh=fresh, progress=partial(display.advance, progress))
    _print(found)


def _print(tokens: Tokens) -> None:
    """What became of the text."""
    headings = ("text", "documents", "dropped", "characters", "replaced", "dropped", "training", "validation")
    rows = []
    for part in tokens.counts:
        counts = (
            part.documents,
            part.documents_dropped,
            part.characters,
            part.characters_replaced,
            part.characters_dropped,
            part.train_tokens,
            part.validation_tokens,
        )
        rows.append((part.name, *(f"{count:,}" for count in counts)))
    display.show(headings, rows)
    for part in tokens.counts:
        display.note(f"{part.name}: {part.origin}.")
    for why in {part.fallback: None for part in tokens.counts if part.fallback}:
        display.warning(f"The tokens are bytes: {why}.")
    train, validation = len(tokens.train), len(tokens.validation)
    characters = sum(part.characters for part in tokens.counts)
    display.note(
        f"{train:,} tokens to train on, {validation:,} held out; a vocabulary of {tokens.vocabulary.size:,}, "
        f"{characters / (train + validation):.2f} characters a token. In {tokens.folder}."
    )
