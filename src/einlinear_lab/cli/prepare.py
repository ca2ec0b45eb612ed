"""The command `einlinear prepare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import numbers


def prepare_command(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE")],
    out: Annotated[Path, typer.Option()],
    tokens: str = "auto",
    vocab_size: int | None = None,
    validation: float = 0.05,
    limit: str | None = None,
    fresh: Annotated[bool, typer.Option("--fresh")] = False,
) -> None:
    """Turn text into tokens for language models, a share of them held out for validation.

    A text that the folder holds already is not prepared again. After an interruption the same command starts over.

    Args:
        sources: english (tools/fetch_english.sh fetches it), code (Python's standard library), openwebtext,
            hub:OWNER/NAME, a .jsonl, .json, .csv or .parquet file with a column text, a text file, or a folder of .txt
            files. Files may be compressed (.gz).
        out: Folder for the tokens.
        tokens: auto (characters, or bytes where a text of yours needs others), char (96 characters), bytes (256) or bpe
            (byte pairs).
        vocab_size: Size of the vocabulary of bpe, 257 to 65536. Default: 4096.
        validation: Share of each text that is held out.
        limit: Largest number of characters of each text, such as 500k or 2M. Default: all.
        fresh: Prepare a text again that the folder holds.
    """
    require(LAB)
    from einlinear_lab.data import TextConfig, prepare_tokens
    from einlinear_lab.data.text.prepare import load_prepared

    interrupted = f"Interrupted. The same command prepares {out} from the start."
    with display.user_errors(), display.interruptible(interrupted):
        limits = numbers(limit, "--limit") or (None,)
        if len(limits) > 1:
            raise ValueError(f"--limit {limit}: give one number")
        options: dict[str, Any] = {"vocab_size": vocab_size, "validation": validation, "limit": limits[0]}
        config = TextConfig(sources=tuple(sources), tokens=tokens, **options)
        prepared = None if fresh else load_prepared(config, out)
        if prepared:
            display.note(f"{out} holds this text already; --fresh prepares it again.")
        else:
            with display.progress() as progress:
                prepared = prepare_tokens(config, out, fresh=fresh, progress=partial(display.advance, progress))
    headings = ("text", "documents", "dropped", "characters", "replaced", "dropped", "training", "validation")
    columns = (
        *("documents", "documents_dropped", "characters", "characters_replaced", "characters_dropped"),
        *("train_tokens", "validation_tokens"),
    )
    counts = prepared.counts
    display.show(headings, [(c.name, *(f"{getattr(c, column):,}" for column in columns)) for c in counts])
    for corpus in counts:
        display.note(f"{corpus.name}: {corpus.origin}.")
    for reason in {corpus.fallback: None for corpus in counts if corpus.fallback}:
        display.warning(f"The tokens are bytes: {reason}.")
    train, held_out = len(prepared.train), len(prepared.validation)
    characters = sum(corpus.characters for corpus in counts)
    display.note(
        f"{train:,} tokens to train on, {held_out:,} held out; a vocabulary of {prepared.tokenizer.vocab_size:,}, "
        f"{characters / (train + held_out):.2f} characters a token. In {prepared.folder}."
    )
