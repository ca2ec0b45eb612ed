"""The command line: parses, calls, prints. Every command has a file of its name; what they share:

app.py        all of them, as one program
options.py    arguments and options
parsing.py    what is written as one argument: lists, NAME=VALUE
packages.py   the packages that they need
importing.py  code of the user's, for --import
running.py    doing the runs of a command
display.py    messages, tables, progress bars
endings.py    how they end early
"""

from einlinear.cli.packages import CLI, require


def main() -> None:
    """The `einlinear` command."""
    require(CLI)
    from einlinear.cli.app import app  # not before it is known that it can be imported

    app()
