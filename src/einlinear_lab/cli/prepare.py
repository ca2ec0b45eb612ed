"""The command `einlinear prepare`."""

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
            help="auto (characters, or bytes where a text of yours needs others), char (96 characters), bytes (256) or "
            "bpe (byte pairs)."
        ),
    ] = "auto",
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the vocabulary of bpe, 257 to 65536. Default: 4096.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of each text that is held out.")] = 0.05,
    limit: Annotated[
        str | None, typer.Option(help="Largest number of characters of each text, such as 500k or 2M. Default: all.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prepare a text again that the folder holds.")] = False,
) -> None:
    """Turn text into tokens for language models, a share of them held out for validation.

    A text that the folder holds already is not prepared again. After an interruption the same command starts over.
    """
    require(LAB)
    from einlinear_lab.data import TextConfig, prepare_tokens
    from einlinear_lab.data.text.prepare import load_prepared

    with user_errors(), interruptible(f"Interrupted. The same command prepares {out} from the start."):
        characters = numbers(limit, "--limit")
        if characters and len(characters) > 1:
            raise ValueError(f"--limit {limit}: give one number")
        config = TextConfig(
            sources=tuple(sources),
            tokens=tokens,
            vocab_size=vocab_size,
            validation=validation,
            limit=characters[0] if characters else None,
        )
        prepared = None if fresh else load_prepared(config, out)
        if prepared:
            display.note(f"{out} holds this text already; --fresh prepares it again.")
        else:
            with display.progress() as progress:
                prepared = prepare_tokens(config, out, fresh=fresh, progress=partial(display.advance, progress))
    _print(prepared)


def _print(tokens: Tokens) -> None:
    """Print the counts of every corpus."""
    headings = ("text", "documents", "dropped", "characters", "replaced", "dropped", "training", "validation")
    columns = (
        *("documents", "documents_dropped", "characters", "characters_replaced", "characters_dropped"),
        *("train_tokens", "validation_tokens"),
    )
    rows = [(corpus.name, *(f"{getattr(corpus, column):,}" for column in columns)) for corpus in tokens.counts]
    display.show(headings, rows)
    for corpus in tokens.counts:
        display.note(f"{corpus.name}: {corpus.origin}.")
    for reason in {corpus.fallback: None for corpus in tokens.counts if corpus.fallback}:
        display.warning(f"The tokens are bytes: {reason}.")
    train, validation = len(tokens.train), len(tokens.validation)
    characters = sum(corpus.characters for corpus in tokens.counts)
    display.note(
        f"{train:,} tokens to train on, {validation:,} held out; a vocabulary of {tokens.tokenizer.vocab_size:,}, "
        f"{characters / (train + validation):.2f} characters a token. In {tokens.folder}."
    )
