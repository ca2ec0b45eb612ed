"""How commands end early: on a mistake of the user's, or on Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from einlinear_lab.cli import display


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the library says about wrong arguments, files and missing packages into one message and exit code 2.

    Only around what checks and reads what the user gave: an error of the same type later on is a bug. Under torchrun
    all processes find the same mistake, and the first one of every machine says so.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            display.error(str(error))
        raise typer.Exit(2) from None


@contextmanager
def system_errors() -> Iterator[None]:
    """The same around training, for what is no bug there: a folder in use, a full disk."""
    try:
        yield
    except OSError as error:
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
