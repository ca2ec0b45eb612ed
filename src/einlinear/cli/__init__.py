"""The command line: parses, calls, prints.

app.py        the commands, of which most have a file of their own, with what they print
running.py    doing the runs of a command
display.py    what several print
endings.py    how they end early
importing.py  code of the user's, for --import
packages.py   the packages that they need
parsing.py    lists that are written as one argument
"""

from einlinear.cli.packages import CLI, require


def main() -> None:
    """The `einlinear` command."""
    require(CLI)
    from einlinear.cli.app import app  # not before it is known that it can be imported

    app()
