"""Patterns, ``"(g a), g r f a, f e g r -> (f e)"``: the parser of their grammar (guide: docs/guides/structures.md).

Calls of families, ``"btt(rank=2)"``, have a grammar of their own: `einlinear.structures.spec` parses their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import chain

from einlinear.structures import limits

Axes = tuple[str, ...]

_TOKEN = re.compile(
    r"\s*(?:(?P<keyword>where\b)|(?P<name>[A-Za-z_]\w*)|(?P<number>\d+\.\d+|\d+)|(?P<symbol>->|[(),+=/^])|(?P<end>$)|(?P<other>\S))",
    re.ASCII,
)
# characters that an error shows of a long text
_EXCERPT = 240


class PatternError(ValueError):
    """A pattern or spec that cannot be read. The message shows the text, with a caret under the mistake."""

    def __init__(self, message: str, text: str, position: int) -> None:
        start = max(0, position - _EXCERPT // 2) if len(text) > _EXCERPT else 0
        excerpt = text[start : start + _EXCERPT]
        excerpt = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in excerpt)
        super().__init__(f"{message}\n    {excerpt}\n    {' ' * (position - start)}^")


@dataclass(frozen=True)
class Size:
    """The size of an axis as a function of the features: ``scale * features**exponent``."""

    scale: Fraction
    exponent: Fraction = Fraction(0)

    def of(self, features: int) -> float:
        with suppress(OverflowError):
            size: float = float(self.scale) * float(features) ** float(self.exponent)
            if size <= limits.MAX_SIZE:
                return size
        raise ValueError(f"the size {self} of an axis is more than {limits.MAX_SIZE} for {features} features")

    def __str__(self) -> str:
        if self.exponent == 0:
            return str(self.scale)
        if self.exponent == 1:
            # all digits of the divisor, which was written as a decimal number
            divisor = Context(prec=1000).divide(*map(Decimal, (1 / self.scale).as_integer_ratio()))
            return f"features/{divisor:f}"
        return f"features^{self.exponent}"


@dataclass(frozen=True)
class TermPattern:
    """One term of a pattern: the axes of the input features, of each factor as written, and of the output features."""

    inputs: Axes
    factors: tuple[Axes, ...]
    outputs: Axes

    @cached_property
    def axes(self) -> Axes:
        return tuple(dict.fromkeys(chain(self.inputs, *self.factors, self.outputs)))

    def __str__(self) -> str:
        inputs, outputs = (axes[0] if len(axes) == 1 else f"({' '.join(axes)})" for axes in (self.inputs, self.outputs))
        return f"{', '.join([inputs, *map(' '.join, self.factors)])} -> {outputs}"


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: terms that are summed, and the axes with a fixed size. `str` returns its canonical text."""

    terms: tuple[TermPattern, ...]
    sizes: tuple[tuple[str, Size], ...] = ()

    def __str__(self) -> str:
        text = " + ".join(map(str, self.terms))
        return f"{text} where {', '.join(f'{axis}={size}' for axis, size in self.sizes)}" if self.sizes else text

    @cached_property
    def axes(self) -> Axes:
        """All axes, in order of first appearance."""
        return tuple(dict.fromkeys(chain.from_iterable(term.axes for term in self.terms)))

    @cached_property
    def rank_axes(self) -> Axes:
        """The axes that are in neither the input nor the output of any term."""
        outer = {axis for term in self.terms for axis in term.inputs + term.outputs}
        return tuple(axis for axis in self.axes if axis not in outer)

    def with_sizes(self, sizes: Mapping[str, int]) -> Pattern:
        fixed = dict(self.sizes)
        for axis, value in sizes.items():
            if axis not in self.axes:
                raise ValueError(f"sizes names the axis {axis!r}, but the pattern's axes are {', '.join(self.axes)}")
            size = Size(Fraction(limits.validate_size(f"the size of axis {axis!r}", value)))
            if fixed.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis!r} is given two sizes that contradict: {fixed[axis]} and {size}")
        return Pattern(self.terms, tuple(fixed.items()))


@lru_cache(maxsize=1024)
def parse(text: str) -> Pattern:
    """Parse a pattern. Raises PatternError (a ValueError) that points at the mistake in the text."""
    pattern = _Parser(" ".join(limits.check_text(text).split())).pattern()
    factors = [axes for term in pattern.terms for axes in term.factors]
    parts = {"terms": pattern.terms, "factors": factors, "axes": pattern.axes}
    for (name, part), limit in zip(parts.items(), (limits.MAX_TERMS, limits.MAX_FACTORS, limits.MAX_AXES), strict=True):
        if len(part) > limit:
            raise ValueError(f"a pattern has at most {limit} {name}, not {len(part)}")
    return pattern


class Scanner:
    """The tokens of a text, (kind, text, position), read one after another. Kinds are the groups of `token`."""

    def __init__(self, text: str, token: re.Pattern[str], start: int = 0) -> None:
        self.text, self.next = text, 0
        kinds = ((str(match.lastgroup), match) for match in token.finditer(text, start))
        self.tokens = [(kind, match[kind], match.start(kind)) for kind, match in kinds]

    @property
    def kind(self) -> str:
        return self.tokens[self.next][0]

    def take(self) -> str:
        kind, text, _ = self.tokens[self.next]
        if kind == "number" and len(text) > limits.MAX_DIGITS:
            raise self.error(f"a number has at most {limits.MAX_DIGITS} digits, not {len(text)}")
        self.next += 1
        return text

    def accept(self, symbol: str) -> bool:
        """Read the next token if it is this symbol or keyword."""
        matches = self.tokens[self.next][1] == symbol
        self.next += matches
        return matches

    def expect(self, symbol: str, where: str) -> None:
        if not self.accept(symbol):
            raise self.error(f"expected {symbol!r} {where}")

    def error(self, message: str, token: int | None = None) -> PatternError:
        """Return the error that points at a token, by default the next one."""
        return PatternError(message, self.text, self.tokens[self.next if token is None else token][2])


class _Parser(Scanner):
    """Recursive descent over the tokens, with one method per rule of the grammar."""

    def __init__(self, text: str) -> None:
        super().__init__(text, _TOKEN)
        for number, (kind, character, _) in enumerate(self.tokens):
            if kind == "other":
                raise self.error(f"unexpected character {character!r} in the pattern", number)

    def pattern(self) -> Pattern:
        terms = [self.term()]
        while self.accept("+"):
            terms.append(self.term())
        sizes: dict[str, Size] = {}
        if self.accept("where"):
            axes = Pattern(tuple(terms)).axes
            while not sizes or self.accept(","):
                token = self.next
                axis, size = self.size()
                if axis not in axes:
                    raise self.error(f"axis {axis!r} is given a size but is not in the pattern", token)
                if axis in sizes:
                    raise self.error(f"axis {axis!r} is given two sizes", token)
                sizes[axis] = size
        if self.kind != "end":
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
        for axis in term.axes:
            side = "input" if axis in term.inputs else "output" if axis in term.outputs else None
            if sum(axis in factor for factor in term.factors) < (1 if side else 2):
                token = next(i for i in range(start, self.next) if self.tokens[i][1] == axis)
                if side:
                    raise self.error(f"no factor carries axis {axis!r} of the {side}", token)
                raise self.error(f"axis {axis!r} is only in one factor: it must also be in another or outside", token)
        return term

    def group(self, name: str) -> Axes:
        if not self.accept("("):
            return (self.axis(name),)
        axes = self.axes(name)
        self.expect(")", f"or an axis of {name}")
        return axes

    def axes(self, name: str) -> Axes:
        axes = [self.axis(name)]
        while self.kind == "name":
            axis = self.axis(name)
            if axis in axes:
                raise self.error(f"axis {axis!r} stands twice in {name}", self.next - 1)
            axes.append(axis)
        return tuple(axes)

    def axis(self, name: str) -> str:
        if self.kind != "name":
            raise self.error(f"expected an axis of {name}")
        return self.take()

    def size(self) -> tuple[str, Size]:
        axis = self.axis("'where'")
        self.expect("=", "after the axis")
        if self.accept("features"):
            if self.accept("/"):
                return axis, Size(1 / self.number("a divisor"), Fraction(1))
            self.expect("^", "or '/' after features")
            exponent = self.number("an exponent")
            return axis, Size(Fraction(1), exponent / self.number("a divisor") if self.accept("/") else exponent)
        token = self.next
        size = self.number("a size")
        if size.denominator != 1 or size < 1:
            raise self.error(f"the size of axis {axis!r} must be a whole number of at least 1", token)
        return axis, Size(size)

    def number(self, name: str) -> Fraction:
        token = self.next
        number = Fraction(self.take()) if self.kind == "number" else None
        if number is None or (name == "a divisor" and not number):
            raise self.error(f"expected {name}", token)
        return number
