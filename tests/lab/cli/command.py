"""Calling the command line, from the arguments to the exit code, and what several tests call it with."""

import re

from typer.testing import CliRunner

from einlinear_lab.cli.app import app, load

# A comparison: what all have in common, and one of four runs.
QUICK = ("--data", "digits", "--epochs", "1", "--batch-size", "256", "depth=1", "--seeds", "1")
TINY = ("--structures", "dense; btt", "--macs", "10k,20k", "--dense-reach", "1", *QUICK)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def assert_refused(answer: tuple[int, str, str], *parts: str) -> None:
    """One message and no traceback."""
    code, out, err = answer
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    for part in parts:
        assert part in err


def said_default(command: str, option: str) -> str:
    """What the help of an option says. It is typed there, as help is shown without the packages of what has it."""
    (text,) = (parameter.help for parameter in load(command).params if parameter.name == option)
    found = re.search(r"Default: (.+)\.$", text)
    assert found
    return found[1]
