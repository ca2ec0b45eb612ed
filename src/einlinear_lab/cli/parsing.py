"""What is written as one argument: lists of structures, lists of numbers, NAME=VALUE, a floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from einlinear.structures.spec import is_family

FLAGS = ("--skip-broken",)  # options of runs that may stand without a value


def specs(texts: str | list[str] | None) -> tuple[str, ...] | None:
    """["dense; tt(rank=2, cores=3), btt", "monarch"] -> ("dense", "tt(rank=2, cores=3)", "btt", "monarch")."""
    if not texts:
        return None
    found: list[str] = []
    for part in ";".join([texts] if isinstance(texts, str) else texts).split(";"):
        pieces = _split_at_commas(part)
        found += pieces if all(map(is_family, pieces)) else [part.strip()]  # the commas of a pattern are its own
    if not any(found):
        raise ValueError("--structures is empty; write structures such as dense; btt(rank=2)")
    return tuple(filter(None, found))


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """ "50k,1.5M" -> (50000, 1500000)."""
    if text is None:
        return None
    sizes = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    found: list[int] = []
    for word in filter(None, map(str.strip, text.split(","))):
        size = sizes.get(word[-1].lower())
        try:
            number = Fraction(word[:-1] if size else word) * (size or 1)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{option}: {word!r} is no number; write numbers such as 50k,100k,1.5M") from None
        if number.denominator > 1:
            raise ValueError(f"{option}: {word!r} is not a whole number")
        found.append(int(number))
    if not found:
        raise ValueError(f"{option} is empty; write numbers such as 50k,100k,1.5M")
    return tuple(found)


def assignments(words: Sequence[str] | None) -> dict[str, str]:
    """Options by name; of one that is given twice, the last value.

    >>> assignments(["lr=1e-3", "--batch-size", "64", "--skip-broken", "--depth=2"])
    {'lr': '1e-3', 'batch_size': '64', 'skip_broken': 'true', 'depth': '2'}

    Raises:
        ValueError: a word that sets nothing.
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
        name = name.strip().replace("-", "_")
        if not value:
            raise ValueError(f"{word!r} has no value; write NAME=VALUE, such as lr=1e-3")
        options[name] = value.strip()
    return options


def floor_of(text: str) -> float | None:
    """The option --floor; None where the floor is to be fitted.

    Raises:
        ValueError: it is neither a number of at least zero nor "fit".
    """
    if text == "fit":
        return None
    try:
        floor = float(text)
    except ValueError:
        floor = math.nan
    if not 0 <= floor < math.inf:
        raise ValueError(f"--floor must be a number of at least 0, or fit, not {text!r}")
    return floor


def _split_at_commas(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]
