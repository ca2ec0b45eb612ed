"""The command line: parses, calls, prints.

app.py        the commands
display.py    what they print
"""

import sys
from importlib.util import find_spec

EXTRA = (
    "jinja2",
    "kornia",
    "PIL",
    "plotly",
    "rich",
    "scipy",
    "sklearn",
    "typer",
)  # what 'einlinear[experiments]' installs


def main() -> None:
    """The `einlinear` command."""
    missing = [module for module in EXTRA if find_spec(module) is None]
    if missing:
        sys.exit(
            f"The einlinear command needs packages that are not installed ({', '.join(missing)}). "
            "Install them with:  pip install 'einlinear[experiments]'"
        )
    from einlinear.cli.app import app  # not before it is known that it can be imported

    app()
