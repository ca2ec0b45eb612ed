"""Upper limits of structures, far beyond any real use.

Text that describes structures is also read from the config.json of downloaded models. The limits make sure that
careless or hostile text cannot take long.
"""

from __future__ import annotations

import operator
from typing import Any

# characters of a spec
MAX_TEXT = 10_000
# terms, factors and axes of a pattern
MAX_TERMS = 64
MAX_FACTORS = 64
MAX_AXES = 256
# digits of a number in a text
MAX_DIGITS = 200
# features, and the size of an axis
MAX_SIZE = 2**31 - 1
# MACs, and any argument of a family
MAX_NUMBER = 10**30


def check_text(text: str) -> None:
    """Raise ValueError for text that is too long to be a structure."""
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"a structure is described by at most {MAX_TEXT:,} characters, not {len(text):,}: {text[:40]}…"
        )


def as_int(value: Any) -> int | None:
    """Convert an integer of any kind, such as numpy.int64, to int. Return None for everything else, bools included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def validate_size(name: str, value: Any) -> int:
    """Convert a size or a number of features to int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1 or above `MAX_SIZE`.
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, not {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {format_int(number)}")
    if number > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, not {format_int(number)}")
    return number


def format_int(number: int) -> str:
    """Format an int for a message. Python refuses to print very long ones."""
    return str(number) if abs(number) < 10**MAX_DIGITS else f"a number of more than {MAX_DIGITS} digits"
