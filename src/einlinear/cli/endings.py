"""How commands end early: on a mistake of the user's, or on Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from einlinear.cli import display


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the library says about wrong arguments and files into one message and exit code 2.

    Only around what checks and reads what the user gave: an error of the same type later on is a bug.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        display.error(str(error))
        raise typer.Exit(2) from None


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let Ctrl-C end the command with a message and the customary exit code."""
    try:
        yield
    except KeyboardInterrupt:
        display.warning(message)
        raise typer.Exit(130) from None
