"""Arguments of several commands, and the parsing of lists of structures or numbers, of NAME=VALUE and of a floor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from einlinear.structures.spec import is_family

# names of dtypes, with the short ones
_DTYPES = {
    "auto": "auto",
    **{name: name for name in ("float64", "float32", "bfloat16", "float16")},
    **{"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Options of runs that need no value.
FLAGS = ("--skip-broken",)

_CONFIG = (
    "model=mlp, vit, gpt, opt or pythia; data=NAME, a folder or a prepared text; structure, width, depth, steps, lr, "
    "batch_size, seed, ... An unknown name is answered with the list of all."
)
_WORKERS = "Processes that train at the same time. Default: one per CPU core, or per GPU."
_MIX = "Add to a folder whose runs were made by another version of einlinear."
_INTERLEAVE = (
    "Let the runs of a seed take turns in one process, so that changes of the machine slow them all alike and their "
    "training times can be compared. All their models are in memory at once."
)
Folders = Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Results folders, taken together.")]
RunConfig = Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help=_CONFIG)]
MixCode = Annotated[bool, typer.Option("--mix-code", help=_MIX)]
Interleave = Annotated[bool, typer.Option("--interleave", help=_INTERLEAVE)]
On = Annotated[str, typer.Option(help="Where to train: local (processes of this machine) or ray (a cluster).")]
Workers = Annotated[int | None, typer.Option(min=1, help=_WORKERS)]
Address = Annotated[str | None, typer.Option(help="Address of the Ray cluster. Default: a new one on this machine.")]
Cpus = Annotated[float | None, typer.Option(help="CPU cores for each run on Ray. Default: 1.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs for each run on Ray. Default: none.")]


def specs(texts: str | list[str] | None) -> tuple[str, ...] | None:
    """["dense; tt(rank=2, cores=3), btt", "monarch"] -> ("dense", "tt(rank=2, cores=3)", "btt", "monarch")."""
    if not texts:
        return None
    result: list[str] = []
    for text in ";".join([texts] if isinstance(texts, str) else texts).split(";"):
        # Commas separate families; a pattern has commas of its own.
        families = _split_at_commas(text)
        result += families if all(map(is_family, families)) else [text.strip()]
    if not any(result):
        raise ValueError("--structures is empty; write structures such as dense; btt(rank=2)")
    return tuple(filter(None, result))


def parse_bytes(text: str, option: str) -> int:
    """Return the bytes of a text such as "2GB", "1.5 GB" or "800 MB", whose units are powers of 1,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB|TB)", text.strip(), re.IGNORECASE)
    if match is None or not (count := round(float(match[1]) * _BYTES[match[2].upper()])):
        raise ValueError(f"{option} must be a number of MB or GB, such as 2GB, not {text!r}")
    return count


def parse_dtype(text: str, option: str) -> str:
    """Return the name of a dtype in torch, or "auto"."""
    if text not in _DTYPES:
        raise ValueError(f"{option} must be one of {', '.join(_DTYPES)}, not {text!r}")
    return _DTYPES[text]


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def words(text: str | None) -> tuple[str, ...] | None:
    """ "forward, train" -> ("forward", "train"), "none" -> ()."""
    return None if text is None else tuple(word for word in map(str.strip, text.split(",")) if word not in ("", "none"))


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """ "50k,1.5M" -> (50000, 1500000)."""
    if text is None:
        return None
    sizes = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    values: list[int] = []
    for word in filter(None, map(str.strip, text.split(","))):
        size = sizes.get(word[-1].lower())
        try:
            number = Fraction(word[:-1] if size else word) * (size or 1)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{option}: {word!r} is no number; write numbers such as 50k,100k,1.5M") from None
        if number.denominator > 1:
            raise ValueError(f"{option}: {word!r} is not a whole number")
        values.append(int(number))
    if not values:
        raise ValueError(f"{option} is empty; write numbers such as 50k,100k,1.5M")
    return tuple(values)


def assignments(words: Sequence[str] | None) -> dict[str, str]:
    """Return options by name; the last value of an option counts. Raises ValueError for a word that is no assignment.

    >>> assignments(["lr=1e-3", "--batch-size", "64", "--skip-broken", "--depth=2"])
    {'lr': '1e-3', 'batch_size': '64', 'skip_broken': 'true', 'depth': '2'}
    """
    options: dict[str, str] = {}
    rest = iter(words or ())
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in FLAGS:
            value = "true"
        elif word.startswith("--") and not equals:
            value = next(rest, "")
        elif not equals:
            example = f"data={word}" if Path(word).exists() else "lr=1e-3"
            raise ValueError(f"{word!r} sets no option; write NAME=VALUE, such as {example}")
        if not value:
            raise ValueError(f"{word!r} has no value; write NAME=VALUE, such as lr=1e-3")
        options[name.strip().replace("-", "_")] = value.strip()
    return options


def floor_of(text: str) -> float | None:
    """Parse --floor: a number of at least 0, or None for "fit". Raises ValueError for other texts."""
    if text == "fit":
        return None
    try:
        floor = float(text)
    except ValueError:
        floor = math.nan
    if not 0 <= floor < math.inf:
        raise ValueError(f"--floor must be a number of at least 0, or fit, not {text!r}")
    return floor
