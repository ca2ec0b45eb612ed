"""Packages that commands need beyond those of the library, and the extras that install them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

CLI = ("rich", "typer")
# Of commands that train or report.
LAB = (
    *(*CLI, "datasets", "jinja2", "joblib", "numpy", "optuna", "PIL", "plotly", "pydantic", "safetensors"),
    *("scipy", "sklearn", "tokenizers", *(() if sys.version_info >= (3, 11) else ("tomli",))),
)
PRETRAINED = (*CLI, "safetensors", "scipy", "transformers")
RAY = ("ray",)
_INSTALLED_BY = {CLI: "'einlinear[lab]'", LAB: "'einlinear[lab]'", PRETRAINED: "'einlinear[pretrained]'", RAY: "ray"}


def require(modules: tuple[str, ...]) -> None:
    """Exit with the command that installs the packages if a module cannot be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(
            f"This command needs packages that are not installed ({', '.join(missing)}). "
            f"Install them with:  pip install {_INSTALLED_BY[modules]}"
        )
