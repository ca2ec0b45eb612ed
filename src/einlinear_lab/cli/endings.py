"""Early ends of commands: errors of the user, errors of the system, Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from einlinear_lab.cli import display


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of wrong arguments, files and missing packages into a message and exit code 2.

    For checks of the user's input only: later, an error of the same type is a bug. Under torchrun all processes raise
    the same error, and the first process of every machine prints it.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            display.error(str(error))
        raise typer.Exit(2) from None


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn errors of the system during training, such as a full disk, into a message and exit code 2."""
    try:
        yield
    except OSError as error:
        display.error(str(error))
        raise typer.Exit(2) from None


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """End the command on Ctrl-C with a message and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        display.warning(message)
        raise typer.Exit(130) from None
