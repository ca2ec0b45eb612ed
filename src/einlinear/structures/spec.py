"""From what a user writes to a `Structure`: "btt(rank=2)", a pattern, a compute budget."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from einlinear.structures import limits
from einlinear.structures.budget import fewest_blocks, largest_rank, within
from einlinear.structures.families import find_family
from einlinear.structures.pattern import Pattern, PatternError, parse
from einlinear.structures.structure import Structure, build

_FEATURES = {"in_features", "out_features"}  # arguments that a builder is given, not the user


def structure(
    spec: str | Structure,
    in_features: int,
    out_features: int,
    *,
    max_macs: float | None = None,
    sizes: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Structure:
    """The structure of a matrix of shape (out_features, in_features).

    Args:
        spec: a family, ``"btt(rank=2)"`` or ``"btt"``, or a pattern, ``"(g a), g r f a, f e g r -> (f e)"``.
        in_features, out_features: the size of the layer, integers of any kind up to 2^31 - 1.
        max_macs: a fraction of the MACs of dense, at most 1. What spends compute and is not given is chosen as rich as
            this budget allows: of a family the rank, else the number of blocks; of a pattern its one rank axis without
            a size.
        sizes: sizes of axes of a pattern, by name.
        **arguments: arguments of the family, as if written in the spec.

    Raises:
        DoesNotFit: sizes that contradict the features, or features that would have to be padded by more than 15 %:
            there is no such structure at this size.
        ValueError: an unknown family (the nearest is named) or argument, a pattern that cannot be read (the place is
            shown), a budget that is too small, more text, terms, axes or factors than any real structure has
            (`structures/limits.py`). DoesNotFit is one as well.
        TypeError: an argument of the wrong type.

    Example:
        >>> import einlinear as el
        >>> s = el.structure("btt(rank=2)", 1024, 4096)
        >>> s.params, s.macs, s.rank
        (393216, 393216, 1024)
        >>> el.structure("btt", 1024, 4096, max_macs=0.25).spec
        'btt(rank=5)'
    """
    if isinstance(spec, Structure):
        spec = spec.spec
    if not isinstance(spec, str):
        raise TypeError(f"a structure is given as text such as 'btt(rank=2)', not {spec!r}")
    limits.check_text(spec)
    in_features = limits.size("in_features", in_features)
    out_features = limits.size("out_features", out_features)
    if max_macs is not None:
        if not isinstance(max_macs, Real) or isinstance(max_macs, bool) or not 0 < max_macs <= 1:
            shown = limits.shown(max_macs) if isinstance(max_macs, int) else repr(max_macs)
            raise ValueError(
                f"max_macs is a fraction of the MACs of dense, above 0 and at most 1, such as 0.25, not {shown}"
            )
        max_macs = float(max_macs)
    if not is_family(spec):
        if arguments:
            named = ", ".join(arguments)
            raise ValueError(
                f"a pattern takes no arguments, not {named}=: write sizes into it, as in 'where r=2', or give them as "
                'sizes={"r": 2}'
            )
        pattern = parse(" ".join(spec.split())).with_sizes(sizes or {})
        return _from_pattern(pattern, in_features, out_features, max_macs)
    if sizes is not None:
        raise ValueError(f"sizes= belongs to a pattern; the family in {spec!r} takes arguments by name")
    family, written = parse_family(spec)
    twice = written.keys() & arguments.keys()
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice: in {spec!r} and as an argument")
    given = {name: exact(value) for name, value in arguments.items()}
    return _from_family(family, written | given, in_features, out_features, max_macs)


def is_family(spec: str) -> bool:
    """Whether a spec names a family, alone or with a bracket; all else is a pattern."""
    return re.match(r"\s*[\w-]+\s*(\(|$)", spec) is not None


def parse_family(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "btt(rank=2)" into the family's name and the arguments. Raises ValueError that points at a mistake."""
    limits.check_text(spec)
    name = spec.partition("(")[0].strip()
    find_family(name)
    return name, _Arguments(spec, name).read()


_TOKEN = re.compile(
    r"""\s*(?:(?P<name>[^\W\d]\w*)|(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?!\w)
    |(?P<text>'[^'\\]*'|"[^"\\]*")|(?P<symbol>\*\*|[(),=/-])|(?P<end>$)|(?P<other>\S))""",
    re.VERBOSE,
)
_CONSTANTS = {"True": True, "False": False, "None": None}
_MAX_NESTED = 20  # tuples and minus signs


class _Arguments:
    """Reads what follows the name of a family: its arguments by name, each a number, a fraction, a word or a tuple."""

    def __init__(self, spec: str, name: str) -> None:
        self.spec, self.name = spec, name
        self.tokens = list(_TOKEN.finditer(spec, spec.index(name) + len(name)))
        self.next = 0

    def read(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.accept("("):
            while not self.accept(")"):
                start = self.next
                if self.accept("**"):
                    raise self.error("** cannot be read here", start)
                if self.kind() != "name" or self.tokens[start + 1]["symbol"] != "=":
                    self.value(0)  # which may be what cannot be read
                    raise self.error(f"name the argument: {self.name}(argument=value)", start)
                argument = self.take()
                self.expect("=")
                if argument in arguments:
                    raise self.error(f"{argument} is given twice", start)
                arguments[argument] = self.value(0)
                if not self.accept(","):
                    self.expect(")")
                    break
        if self.kind() != "end":
            raise self.error(f"expected {self.name}(argument=value, ...)")
        return arguments

    def value(self, nested: int) -> Any:
        """A number, a fraction such as 1/2, a word, or a tuple of these."""
        start, left = self.next, self.operand(nested)
        while self.accept("/"):
            right = self.operand(nested)
            if not _is_number(left) or not _is_number(right) or not right:
                raise self.unreadable(start)
            left = Fraction(left) / right
        return left

    def operand(self, nested: int) -> Any:
        start, kind = self.next, self.kind()
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
            raise self.error(f"cannot read the arguments of {self.name}")
        if kind not in ("name", "number", "text"):
            raise self.unreadable(start)
        text = self.take()
        if kind == "number":
            if len(text) > limits.MAX_DIGITS:
                raise self.error(f"a number has at most {limits.MAX_DIGITS} digits, not {len(text)}", start)
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

    def kind(self) -> str:
        return str(self.tokens[self.next].lastgroup)

    def take(self) -> str:
        token = self.tokens[self.next]
        self.next += 1
        return str(token[str(token.lastgroup)])

    def accept(self, symbol: str) -> bool:
        found = self.tokens[self.next]["symbol"] == symbol
        self.next += found
        return found

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            if self.kind() in ("other", "symbol"):
                raise self.unreadable(self.next)
            raise self.error(f"cannot read the arguments of {self.name}")

    def unreadable(self, token: int) -> PatternError:
        return self.error("expected a number, a fraction, a word or a tuple", token)

    def error(self, message: str, token: int | None = None) -> PatternError:
        match = self.tokens[self.next if token is None else token]
        return PatternError(message, self.spec, match.start(str(match.lastgroup)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Fraction) and not isinstance(value, bool)


def exact(value: Any) -> Any:
    """Integers of any kind as ints, and floats as the fractions they stand for, also inside tuples.

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
    number = limits.whole(value)
    if number is not None and abs(number) > limits.MAX_NUMBER:
        raise ValueError(f"a number must be at most {limits.MAX_NUMBER:.0e}, not {limits.shown(number)}")
    return value if number is None else number


def _from_pattern(pattern: Pattern, in_features: int, out_features: int, max_macs: float | None) -> Structure:
    if max_macs is None:
        return _build(pattern, in_features, out_features)
    unknown = [axis for axis in pattern.rank_axes if axis not in dict(pattern.sizes)]
    if len(unknown) == 1:
        axis = unknown[0]
        return largest_rank(lambda n: _build(pattern.with_sizes({axis: n}), in_features, out_features), max_macs)
    if unknown:
        raise ValueError(f"max_macs can choose one rank axis, but {', '.join(unknown)} have no size: give all but one")
    return within(_build(pattern, in_features, out_features), max_macs)


@lru_cache(maxsize=4096)
def _build(pattern: Pattern, in_features: int, out_features: int, spec: str | None = None) -> Structure:
    try:
        return build(pattern, in_features, out_features, spec)
    except ValueError as error:  # a DoesNotFit stays one
        raise type(error)(f"{spec or pattern}: {error}") from None


def check_spec(spec: str) -> None:
    """Raise what `structure` would raise at any size: an unknown family or argument, a pattern that cannot be read."""
    if isinstance(spec, Structure):
        raise TypeError(f"a Structure has one size: give its spec, {spec.spec!r}, which is for layers of any size")
    if not isinstance(spec, str):
        raise TypeError(f"a structure is given as text such as 'btt(rank=2)', not {spec!r}")
    limits.check_text(spec)
    if not is_family(spec):
        parse(" ".join(spec.split()))
        return
    name, given = parse_family(spec)
    _check_arguments(name, given)
    if not inspect.signature(find_family(name)).parameters.keys() & _FEATURES:  # else it may refuse some sizes only
        _family_pattern(name, given, 1, 1)


def _from_family(
    name: str, given: dict[str, Any], in_features: int, out_features: int, max_macs: float | None
) -> Structure:
    def make(**chosen: int) -> Structure:
        pattern, spec = _family_pattern(name, given | chosen, in_features, out_features)
        return _build(pattern, in_features, out_features, spec)

    if max_macs is None:
        return make()
    arguments = inspect.signature(find_family(name)).parameters
    knob = next((argument for argument in ("rank", "blocks") if argument in arguments and argument not in given), None)
    if knob == "rank":
        return largest_rank(lambda n: make(rank=n), max_macs)
    if knob == "blocks":
        return fewest_blocks(lambda n: make(blocks=n), min(in_features, out_features), max_macs)
    return within(make(), max_macs)


def _family_pattern(name: str, given: Mapping[str, Any], in_features: int, out_features: int) -> tuple[Pattern, str]:
    """The pattern that a family's builder returns for these arguments, and the canonical spec that says so."""
    builder = find_family(name)
    parameters = inspect.signature(builder).parameters
    own = _check_arguments(name, given)
    features = {"in_features": in_features, "out_features": out_features}
    text = builder(**given, **{p: features[p] for p in parameters if p in features})
    if not isinstance(text, str):
        raise TypeError(f"the builder of {name!r} must return a pattern as text, not {text!r}")
    shown = [f"{p}={_text(given[p])}" for p in own if p in given and given[p] != parameters[p].default]
    return parse(text), f"{name}({', '.join(shown)})" if shown else name


def _check_arguments(name: str, given: Iterable[str]) -> list[str]:
    """The names of a family's arguments, once it is known that it takes the given ones and needs no others."""
    parameters = inspect.signature(find_family(name)).parameters
    own = [parameter for parameter in parameters if parameter not in _FEATURES]
    for argument in given:
        if argument not in own:
            nearest = difflib.get_close_matches(argument, own, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            takes = f"It takes {', '.join(own)}" if own else "It takes no arguments"
            raise ValueError(f"{name} has no argument {argument!r}.{hint} {takes}")
    missing = [p for p in own if parameters[p].default is inspect.Parameter.empty and p not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(f'{p}=' for p in missing)}")
    return own


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, Fraction) and value.denominator > 1000:
        return repr(float(value))  # 0.37123 rather than 37123/100000
    return str(value)
