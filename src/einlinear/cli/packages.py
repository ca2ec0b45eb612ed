"""The packages that commands need beyond those of the library, and the extras that install them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

CLI = ("rich", "typer")  # any command
EXPERIMENTS = (  # those that train or report
    "jinja2",
    "joblib",
    "kornia",
    "numpy",
    "PIL",
    "plotly",
    "pydantic",
    "safetensors",
    "scipy",
    "sklearn",
    *(() if sys.version_info >= (3, 11) else ("tomli",)),
)
TOKENIZERS = ("tokenizers",)  # byte pairs
STREAMED = ("datasets",)  # text of the Hugging Face hub
RAY = ("ray",)  # a cluster
SEARCH = ("optuna",)  # studies
PRETRAINED = ("safetensors", "scipy", "transformers")  # models of transformers
_EXTRAS = {
    CLI: "cli",
    EXPERIMENTS: "experiments",
    TOKENIZERS: "text",
    STREAMED: "text",
    RAY: "ray",
    SEARCH: "search",
    PRETRAINED: "pretrained",
}


def require(modules: tuple[str, ...]) -> None:
    """End the program with a message that says what to install, if one of the modules cannot be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(
            f"This command needs packages that are not installed ({', '.join(missing)}). "
            f"Install them with:  pip install 'einlinear[{_EXTRAS[modules]}]'"
        )
