"""What a structure may be at most: far beyond any real use, so that careless or hostile text cannot take long.

Text that describes structures is also read from the config.json of downloaded models.
"""

from __future__ import annotations

import operator
from typing import Any

MAX_TEXT = 10_000  # characters of a spec
MAX_TERMS = 64
MAX_FACTORS = 64  # of all terms together
MAX_AXES = 256
MAX_DIGITS = 200  # of one number
MAX_SIZE = 2**31 - 1  # of an axis, and features
MAX_NUMBER = 10**30  # of MACs, and of any argument


def check_text(text: str) -> None:
    """Raise ValueError for text that is too long to be a structure."""
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"a structure is described by at most {MAX_TEXT:,} characters, not {len(text):,}: {text[:40]}…"
        )


def whole(value: Any) -> int | None:
    """The int that an integer of any kind stands for, such as numpy.int64; None for all else, booleans included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def size(name: str, value: Any) -> int:
    """A size or a number of features as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1 or above `MAX_SIZE`.
    """
    number = whole(value)
    if number is None:
        raise TypeError(f"{name} must be an int, not {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {shown(number)}")
    if number > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, not {shown(number)}")
    return number


def shown(number: int) -> str:
    """An int as messages show it: Python refuses to print very long ones."""
    return str(number) if abs(number) < 10**MAX_DIGITS else f"a number of more than {MAX_DIGITS} digits"
