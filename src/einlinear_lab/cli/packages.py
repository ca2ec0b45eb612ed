"""The packages that commands need beyond those of the library, and the extras that install them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

CLI = ("rich", "typer")  # any command
LAB = (  # those that train or report
    *CLI,
    "datasets",
    "jinja2",
    "joblib",
    "kornia",
    "numpy",
    "optuna",
    "PIL",
    "plotly",
    "pydantic",
    "safetensors",
    "scipy",
    "sklearn",
    "tokenizers",
    *(() if sys.version_info >= (3, 11) else ("tomli",)),
)
PRETRAINED = (*CLI, "safetensors", "scipy", "transformers")  # models of transformers
RAY = ("ray",)  # a cluster
_INSTALLED_BY = {CLI: "'einlinear[lab]'", LAB: "'einlinear[lab]'", PRETRAINED: "'einlinear[pretrained]'", RAY: "ray"}


def require(modules: tuple[str, ...]) -> None:
    """End the program with a message that says what to install, if one of the modules cannot be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(
            f"This command needs packages that are not installed ({', '.join(missing)}). "
            f"Install them with:  pip install {_INSTALLED_BY[modules]}"
        )
