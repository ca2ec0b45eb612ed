"""`einlinear prepare`: its options, and what it prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from einlinear.cli import display
from einlinear.cli.endings import interruptible, user_errors
from einlinear.cli.packages import EXPERIMENTS, STREAMED, TOKENIZERS, require
from einlinear.cli.parsing import numbers

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear.data import Tokens


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="english (tools/fetch_english.sh fetches it), code (Python's own), openwebtext, hub:OWNER/NAME, a "
            ".parquet or .jsonl file with a column text, a text file, or a folder of .txt files.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokens.")],
    tokens: Annotated[str, typer.Option(help="char (96 characters) or bpe (byte pairs).")] = "char",
    vocab: Annotated[int | None, typer.Option(help="Tokens of bpe, 257 to 65536. Default: 4096.")] = None,
    validation: Annotated[float, typer.Option(help="Share of each part of the text that is held out.")] = 0.05,
    limit: Annotated[
        str | None, typer.Option(help="Take at most so many characters of each part, such as 500k or 2M.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prepare again a text that the folder holds.")] = False,
) -> None:
    """Turn text into the tokens that language models are trained on, a share of it held out for validation.

    Interrupted, it leaves nothing that looks finished; the same command starts over. A text that is there already is
    left as it is.
    """
    require(EXPERIMENTS)
    from einlinear.data import Recipe, prepare_tokens
    from einlinear.data.text.prepare import finished
    from einlinear.data.text.read import streams

    if tokens == "bpe":
        require(TOKENIZERS)
    if any(map(streams, sources)):
        require(STREAMED)
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
            with _bar() as progress:
                found = prepare_tokens(recipe, out, fresh=fresh, progress=partial(_advance, progress))
    _print(found)


def _bar() -> Progress:
    console = Console()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _advance(progress: Progress, what: str, done: int, total: int | None) -> None:
    """Show how far one thing has come, the only one at a time."""
    what = escape(what if len(what) <= 40 else f"…{what[-39:]}")  # a path may be long, and have brackets
    for task in progress.tasks:
        if task.description != what:
            progress.remove_task(task.id)
    if not progress.tasks:
        progress.add_task(what, total=total)
    progress.update(progress.tasks[0].id, completed=done)


def _print(tokens: Tokens) -> None:
    """What became of the text."""
    names = ("documents", "dropped", "characters", "replaced", "dropped", "training", "validation")
    table = Table("text", *names, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in tokens.counts:
        values = (
            part.documents,
            part.documents_dropped,
            part.characters,
            part.characters_replaced,
            part.characters_dropped,
            part.train_tokens,
            part.validation_tokens,
        )
        table.add_row(Text(part.name), *(f"{value:,}" for value in values))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    for part in tokens.counts:
        display.note(f"{part.name}: {part.origin}.")
    train, validation = len(tokens.train), len(tokens.validation)
    characters = sum(part.characters for part in tokens.counts)
    display.note(
        f"{train:,} tokens to train on, {validation:,} held out; a vocabulary of {tokens.vocabulary.size:,}, "
        f"{characters / (train + validation):.2f} characters a token. In {tokens.folder}."
    )
