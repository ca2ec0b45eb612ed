"""Arguments of a family, as text and as values: ``(rank=2, theta=(1/2, 0, 1/2))``."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from einlinear.structures import limits
from einlinear.structures.pattern import PatternError, Scanner

_TOKEN = re.compile(
    r"""\s*(?:(?P<name>[^\W\d]\w*)|(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?!\w)
    |(?P<text>'[^'\\]*'|"[^"\\]*")|(?P<symbol>\*\*|[(),=/-])|(?P<end>$)|(?P<other>\S))""",
    re.VERBOSE,
)
_CONSTANTS = {"True": True, "False": False, "None": None}
# how deep tuples and minus signs may be nested
_MAX_NESTED = 20


def parse_arguments(spec: str, family: str) -> dict[str, Any]:
    """Parse the arguments in a spec such as "btt(rank=2)": numbers, fractions, words and tuples of these.

    Raises PatternError (a ValueError) that points at the mistake in the text.
    """
    return _ArgumentParser(spec, family).arguments()


def exact(value: Any) -> Any:
    """Convert integers of any kind to int, and floats to the fractions they stand for, also inside tuples.

    So 1/3 in Python and in text are the same structure. Raises ValueError for numbers that are not finite or huge.
    """
    if isinstance(value, tuple | list):
        return tuple(exact(element) for element in value)
    if isinstance(value, bool | str | Fraction) or value is None:
        return value
    if isinstance(value, Real) and not isinstance(value, Integral):
        value = float(value)
        if not math.isfinite(value) or abs(value) > limits.MAX_NUMBER:
            raise ValueError(f"a number must be at most {limits.MAX_NUMBER:.0e}, not {value}")
        simple = Fraction(value).limit_denominator(1000)
        return simple if abs(simple - Fraction(value)) < 1e-12 else Fraction(repr(value))
    number = limits.as_int(value)
    if number is not None and abs(number) > limits.MAX_NUMBER:
        raise ValueError(f"a number must be at most {limits.MAX_NUMBER:.0e}, not {limits.format_int(number)}")
    return value if number is None else number


def format_value(value: Any) -> str:
    """Format the value of an argument as a spec has it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(format_value, value))})"
    if isinstance(value, Fraction) and value.denominator > 1000:
        # 0.37123 rather than 37123/100000
        return repr(float(value))
    return str(value)


class _ArgumentParser(Scanner):
    """Recursive descent over the tokens after the name of a family."""

    def __init__(self, spec: str, family: str) -> None:
        super().__init__(spec, _TOKEN, spec.index(family) + len(family))
        self.family = family

    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.accept("("):
            while not self.accept(")"):
                start = self.next
                if self.accept("**"):
                    raise self.error("** cannot be read here", start)
                if self.kind != "name" or self.tokens[start + 1][1] != "=":
                    # an unreadable value is the first mistake
                    self.value(0)
                    raise self.error(f"name the argument: {self.family}(argument=value)", start)
                name = self.take()
                self.expect("=")
                if name in arguments:
                    raise self.error(f"{name} is given twice", start)
                arguments[name] = self.value(0)
                if not self.accept(","):
                    self.expect(")")
                    break
        if self.kind != "end":
            raise self.error(f"expected {self.family}(argument=value, ...)")
        return arguments

    def value(self, nested: int) -> Any:
        """A number, a fraction such as 1/2, a word, or a tuple of these."""
        start, value = self.next, self.operand(nested)
        while self.accept("/"):
            divisor = self.operand(nested)
            if not _is_number(value) or not _is_number(divisor) or not divisor:
                raise self.unreadable(start)
            value = Fraction(value) / divisor
        return value

    def operand(self, nested: int) -> Any:
        start, kind = self.next, self.kind
        if nested > _MAX_NESTED:
            raise self.error(f"tuples and minus signs are nested more than {_MAX_NESTED} times")
        if self.accept("-"):
            operand = self.operand(nested + 1)
            if not _is_number(operand):
                raise self.unreadable(start)
            return -operand
        if self.accept("("):
            return self.tuple(nested + 1)
        if kind == "end":
            raise self.error(f"cannot read the arguments of {self.family}")
        if kind not in ("name", "number", "text"):
            raise self.unreadable(start)
        text = self.take()
        if kind == "number":
            try:
                return exact(int(text) if text.isdecimal() else float(text))
            except ValueError as error:
                raise self.error(str(error), start) from None
        return text[1:-1] if kind == "text" else _CONSTANTS.get(text, text)

    def tuple(self, nested: int) -> Any:
        elements, comma = [], False
        while not self.accept(")"):
            elements.append(self.value(nested))
            if not self.accept(","):
                self.expect(")")
                break
            comma = True
        return tuple(elements) if comma or not elements else elements[0]

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            if self.kind in ("other", "symbol"):
                raise self.unreadable(self.next)
            raise self.error(f"cannot read the arguments of {self.family}")

    def unreadable(self, token: int) -> PatternError:
        return self.error("expected a number, a fraction, a word or a tuple", token)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Fraction) and not isinstance(value, bool)
