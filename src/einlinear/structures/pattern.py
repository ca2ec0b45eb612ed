"""The pattern language: one line of text that says what a structured matrix is.

    (g a), g r f a, f e g r -> (f e) where r=2

Before the first comma stands how the input features are read (row-major axes), between the commas the axes of
the factors, after the arrow how the output features are laid out. Several terms are added with ``+``. The
optional ``where`` fixes sizes:

    r=2                two
    r=features/16      a sixteenth of the features, rounded down, at least 1
    a=features^1/2     about the square root of the features (a decimal exponent works too)

with ``features`` the count the axis belongs to: in_features for an axis of the input, out_features for one of
the output, the smaller of the two for an axis of neither. Sizes not fixed are balanced (see `sizes.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain

from einlinear.structures import limits

Axes = tuple[str, ...]

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<number>\d+\.\d+|\d+)|(?P<symbol>->|[(),+=/^])|(?P<end>$))", re.ASCII
)

_HUGE = 2 * math.log(limits.MAX_SIZE)  # a size without its scale
_SHOWN = 240  # characters of the text around a mistake


class PatternError(ValueError):
    """A pattern that cannot be read; the message points at the place in the text."""

    def __init__(self, message: str, text: str, position: int) -> None:
        start = max(0, position - _SHOWN // 2) if len(text) > _SHOWN else 0
        excerpt = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[start : start + _SHOWN])
        super().__init__(f"{message}\n    {excerpt}\n    {' ' * (position - start)}^")


@dataclass(frozen=True)
class Size:
    """The size of an axis as ``scale * features**exponent``."""

    scale: Fraction
    exponent: Fraction = Fraction(0)

    def of(self, features: int) -> float:
        """The size, not yet rounded, where the axis belongs to this many features. Raises ValueError if it is huge."""
        exponent = float(self.exponent)
        if exponent * math.log(features) < _HUGE:
            size = float(float(self.scale) * features**exponent)
            if size <= limits.MAX_SIZE:
                return size
        raise ValueError(f"the size {self} of an axis is more than {limits.MAX_SIZE} for {features} features")

    def __str__(self) -> str:
        if self.exponent == 0:
            return str(self.scale)
        if self.exponent == 1:
            return f"features/{_decimal(1 / self.scale)}"
        return f"features^{self.exponent}"


@dataclass(frozen=True)
class TermPattern:
    """One term: the axes of the input, of each factor as written, and of the output."""

    inputs: Axes
    factors: tuple[Axes, ...]
    outputs: Axes

    def __str__(self) -> str:
        groups = [_group(self.inputs), *(" ".join(axes) for axes in self.factors)]
        return f"{', '.join(groups)} -> {_group(self.outputs)}"


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: the terms that are summed, and the sizes that the text fixes."""

    terms: tuple[TermPattern, ...]
    sizes: tuple[tuple[str, Size], ...] = ()

    def __str__(self) -> str:
        text = " + ".join(map(str, self.terms))
        return f"{text} where {', '.join(f'{axis}={size}' for axis, size in self.sizes)}" if self.sizes else text

    @property
    def axes(self) -> Axes:
        """All axes, in order of first appearance."""
        per_term = (chain(t.inputs, *t.factors, t.outputs) for t in self.terms)
        return tuple(dict.fromkeys(chain.from_iterable(per_term)))

    @property
    def rank_axes(self) -> Axes:
        """The axes that belong to neither the input nor the output of any term."""
        outer = {axis for term in self.terms for axis in term.inputs + term.outputs}
        return tuple(axis for axis in self.axes if axis not in outer)

    def with_sizes(self, sizes: Mapping[str, int]) -> Pattern:
        """The same pattern with more sizes fixed. Raises ValueError for an axis that is not there or fixed twice."""
        known, axes = dict(self.sizes), self.axes
        for axis, given in sizes.items():
            if axis not in axes:
                raise ValueError(f"sizes names the axis {axis!r}, but the pattern's axes are {', '.join(axes)}")
            size = limits.size(f"the size of axis {axis!r}", given)
            if known.setdefault(axis, Size(Fraction(size))) != Size(Fraction(size)):
                raise ValueError(f"axis {axis!r} is given two sizes that contradict: {known[axis]} and {size}")
        return Pattern(self.terms, tuple(known.items()))


def _decimal(number: Fraction) -> str:
    """All digits of a divisor: the text wrote it in decimals, so there is an end to them."""
    numerator, denominator = map(Decimal, number.as_integer_ratio())
    return f"{Context(prec=1000).divide(numerator, denominator):f}"


def _group(axes: Axes) -> str:
    return axes[0] if len(axes) == 1 else f"({' '.join(axes)})"


@lru_cache(maxsize=1024)
def parse(text: str) -> Pattern:
    """Parse a pattern. Raises PatternError (a ValueError) that points at the place where the text goes wrong.

    >>> parse("(g a), g r f a, f e g r -> (f e) where r=2").terms[0].factors
    (('g', 'r', 'f', 'a'), ('f', 'e', 'g', 'r'))
    """
    limits.check_text(text)
    pattern = _Parser(text).pattern()
    counts = (
        ("terms", len(pattern.terms), limits.MAX_TERMS),
        ("factors", sum(len(term.factors) for term in pattern.terms), limits.MAX_FACTORS),
        ("axes", len(pattern.axes), limits.MAX_AXES),
    )
    for what, count, most in counts:
        if count > most:
            raise ValueError(f"a pattern has at most {most} {what}, not {count}")
    return pattern


class _Parser:
    """Recursive descent over the tokens; one method per rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, position
        position = 0
        while not self.tokens or self.tokens[-1][0] != "end":
            match = _TOKEN.match(text, position)
            if match is None:
                position += len(text[position:]) - len(text[position:].lstrip())
                raise PatternError(f"unexpected character {text[position]!r} in the pattern", text, position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.next = 0

    def error(self, message: str, token: int | None = None) -> PatternError:
        return PatternError(message, self.text, self.tokens[self.next if token is None else token][2])

    def accept(self, *texts: str) -> bool:
        if self.tokens[self.next][0] in ("symbol", "name") and self.tokens[self.next][1] in texts:
            self.next += 1
            return True
        return False

    def expect(self, symbol: str, where: str) -> None:
        if not self.accept(symbol):
            raise self.error(f"expected {symbol!r} {where}")

    def pattern(self) -> Pattern:
        terms = [self.term()]
        while self.accept("+"):
            terms.append(self.term())
        sizes: dict[str, Size] = {}
        if self.accept("where"):
            axes = Pattern(tuple(terms)).axes
            while True:
                token = self.next
                axis, size = self.size()
                if axis not in axes:
                    raise self.error(f"axis {axis!r} is given a size but is not in the pattern", token)
                if axis in sizes:
                    raise self.error(f"axis {axis!r} is given two sizes", token)
                sizes[axis] = size
                if not self.accept(","):
                    break
        if self.tokens[self.next][0] != "end":
            raise self.error("expected '+', 'where' or the end of the pattern")
        return Pattern(tuple(terms), tuple(sizes.items()))

    def term(self) -> TermPattern:
        start = self.next
        inputs = self.group("the input")
        factors: list[Axes] = []
        while self.accept(","):
            factors.append(self.axes(f"factor {len(factors) + 1}"))
        if not factors:
            raise self.error("expected ',' and the axes of the first factor")
        self.expect("->", "or ',' after a factor")
        term = TermPattern(inputs, tuple(factors), self.group("the output"))
        self.check(term, start)
        return term

    def check(self, term: TermPattern, start: int) -> None:
        """Every axis must be carried by a factor, and must be read, shared or written: else it does nothing."""
        for axis in dict.fromkeys(chain(term.inputs, *term.factors, term.outputs)):
            token = next(i for i in range(start, self.next) if self.tokens[i][1] == axis)
            carriers = sum(axis in factor for factor in term.factors)
            if not carriers:
                side = "input" if axis in term.inputs else "output"
                raise self.error(f"no factor carries axis {axis!r} of the {side}", token)
            if carriers == 1 and axis not in term.inputs and axis not in term.outputs:
                raise self.error(f"axis {axis!r} is only in one factor: it must also be in another or outside", token)

    def group(self, what: str) -> Axes:
        if not self.accept("("):
            return (self.axis(what),)
        axes = self.axes(what)
        self.expect(")", f"or an axis of {what}")
        return axes

    def axes(self, what: str) -> Axes:
        axes = [self.axis(what)]
        while self.tokens[self.next][0] == "name" and self.tokens[self.next][1] != "where":
            axis = self.axis(what)
            if axis in axes:
                raise self.error(f"axis {axis!r} stands twice in {what}", self.next - 1)
            axes.append(axis)
        return tuple(axes)

    def axis(self, what: str) -> str:
        kind, text, _ = self.tokens[self.next]
        if kind != "name" or text == "where":
            raise self.error(f"expected an axis of {what}")
        self.next += 1
        return text

    def size(self) -> tuple[str, Size]:
        axis = self.axis("'where'")
        self.expect("=", "after the axis")
        if self.accept("features"):
            if self.accept("/"):
                return axis, Size(1 / self.number("a divisor"), Fraction(1))
            self.expect("^", "or '/' after features")
            exponent = self.number("an exponent")
            if self.accept("/"):
                exponent /= self.number("a divisor")
            return axis, Size(Fraction(1), exponent)
        token = self.next
        size = self.number("a size")
        if size.denominator != 1 or size < 1:
            raise self.error(f"the size of axis {axis!r} must be a whole number of at least 1", token)
        return axis, Size(size)

    def number(self, what: str) -> Fraction:
        kind, text, _ = self.tokens[self.next]
        if kind == "number" and len(text) > limits.MAX_DIGITS:
            raise self.error(f"a number has at most {limits.MAX_DIGITS} digits, not {len(text)}")
        if kind != "number" or (what == "a divisor" and Fraction(text) == 0):
            raise self.error(f"expected {what}")
        self.next += 1
        return Fraction(text)
