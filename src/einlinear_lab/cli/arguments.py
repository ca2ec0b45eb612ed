"""Arguments and options of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunConfig = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME=VALUE",
        help="model=mlp, vit, gpt, opt or pythia; data=NAME, a folder or a prepared text; structure, width, depth, "
        "steps, lr, batch_size, seed, ... An unknown name is answered with the list of all.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that train at the same time. Default: one per CPU core, or per GPU."),
]
MixCode = Annotated[
    bool, typer.Option("--mix-code", help="Add to a folder whose runs were made by another version of einlinear.")
]
Folders = Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Results folders, taken together.")]
Floor = Annotated[
    str, typer.Option(help="The loss that scaling laws approach but never reach: a number, or fit to fit it as well.")
]
