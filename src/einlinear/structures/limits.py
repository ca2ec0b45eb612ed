"""Upper limits of structures, far beyond any real use, since specs also come from the config.json of others' models."""

import operator
from typing import Any

# characters of a spec, and digits of a number in a spec
MAX_TEXT, MAX_DIGITS = 10_000, 200
# of a pattern
MAX_TERMS, MAX_FACTORS, MAX_AXES = 64, 64, 256
# features, and the size of an axis
MAX_SIZE = 2**31 - 1
# MACs, and any argument of a family
MAX_NUMBER = 10**30


def check_text(spec: Any) -> str:
    """Return a spec that is text, and not too long to be a structure."""
    if not isinstance(spec, str):
        raise TypeError(f"a structure is given as text such as 'btt(rank=2)', not {spec!r}")
    if len(spec) > MAX_TEXT:
        raise ValueError(f"a structure has at most {MAX_TEXT:,} characters, not {len(spec):,}: {spec[:40]}…")
    return spec


def as_int(value: Any) -> int | None:
    """Convert an integer of any kind, such as numpy.int64, to int. Return None for everything else, bools included."""
    try:
        return None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        return None


def validate_size(name: str, value: Any, most: int = MAX_SIZE) -> int:
    """Convert a size to int. Raises TypeError if it is no integer, ValueError if it is below 1 or above `most`."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, not {value!r}")
    if not 1 <= number <= most:
        bound = "at least 1" if number < 1 else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, not {format_number(number)}")
    return number


def format_number(number: Any) -> str:
    """Format a number for a message. Python refuses to print very long ints."""
    is_long = isinstance(number, int) and abs(number) >= 10**MAX_DIGITS
    return f"a number of more than {MAX_DIGITS} digits" if is_long else repr(number)
