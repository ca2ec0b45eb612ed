"""Specs: from the text that a user writes, ``"btt(rank=2)"`` or a pattern, to a `Structure`.

This module parses the arguments of families; `einlinear.structures.pattern` has the grammar of patterns.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import Any

from einlinear.structures import limits
from einlinear.structures.contraction import contract
from einlinear.structures.families import find_family
from einlinear.structures.pattern import Pattern, PatternError, Scanner, parse
from einlinear.structures.sizes import DoesNotFit, candidate_sizes
from einlinear.structures.structured_matrix import Structure

_TOKEN = re.compile(
    r"""\s*(?:(?P<name>[^\W\d]\w*)|(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?!\w)
    |(?P<text>'[^'\\]*'|"[^"\\]*")|(?P<symbol>\*\*|[(),=/-])|(?P<end>$)|(?P<other>\S))""",
    re.VERBOSE,
)
# how deep tuples and minus signs may be nested, and up to how many blocks a budget chooses
_MAX_NESTED, _MAX_BLOCKS = 20, 1024


class OverBudget(ValueError):
    """No structure is within a budget of MACs."""


def structure(
    spec: str | Structure,
    in_features: int,
    out_features: int,
    *,
    max_macs: float | None = None,
    sizes: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Structure:
    """Build the structure of a matrix of shape (out_features, in_features).

    Args:
        spec: a family, ``"btt(rank=2)"``, or a pattern, ``"(g a), g r f a, f e g r -> (f e)"``.
        in_features, out_features: the size of the layer, integers of any kind up to 2^31 - 1.
        max_macs: a fraction of the MACs of dense, at most 1. It chooses what is not set: the largest rank of a family,
            or else the fewest blocks; the one rank axis of a pattern that has no size.
        sizes: sizes of axes of a pattern, by name.
        **arguments: arguments of the family, as if written in the spec.

    Raises:
        DoesNotFit: the sizes contradict the features, or the features would be padded by more than 15 %.
        ValueError: an unknown family or argument, an unreadable pattern, a budget too small, a text beyond a limit.
        TypeError: an argument of the wrong type.

    Example:
        >>> import einlinear as el
        >>> s = el.structure("btt(rank=2)", 1024, 4096)
        >>> s.params, s.macs, s.rank
        (393216, 393216, 1024)
        >>> el.structure("btt", 1024, 4096, max_macs=0.25).spec
        'btt(rank=5)'
    """
    spec = limits.check_text(spec.spec if isinstance(spec, Structure) else spec)
    in_features = limits.validate_size("in_features", in_features)
    out_features = limits.validate_size("out_features", out_features)
    if max_macs is not None:
        if not isinstance(max_macs, Real) or isinstance(max_macs, bool) or not 0 < max_macs <= 1:
            shown = limits.format_number(max_macs)
            raise ValueError(f"max_macs is a fraction of the MACs of dense, above 0 and at most 1, not {shown}")
        max_macs = float(max_macs)
    if is_family(spec):
        if sizes is not None:
            raise ValueError(f"sizes= belongs to a pattern; the family in {spec!r} takes arguments by name")
        name, written = parse_family(spec)
        if twice := written.keys() & arguments.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is given twice: in {spec!r} and as an argument")
        family = find_family(name)
        given = written | {argument: _exact(value) for argument, value in arguments.items()}
        unset = [name for name in ("rank", "blocks") if name in family.defaults and name not in given][:1]

        def make(**chosen: int) -> Structure:
            pattern = family.pattern({**given, **chosen}, in_features, out_features)
            return _build(pattern, in_features, out_features, family.spec({**given, **chosen}))
    else:
        if arguments:
            named = ", ".join(arguments)
            raise ValueError(f"a pattern takes no arguments, not {named}=: write 'where r=2', or give sizes={{'r': 2}}")
        pattern = parse(spec).with_sizes(sizes or {})
        unset = [axis for axis in pattern.rank_axes if axis not in dict(pattern.sizes)]

        def make(**chosen: int) -> Structure:
            return _build(pattern.with_sizes(chosen), in_features, out_features)

    if max_macs is None or not unset:
        return _within(make(), max_macs)
    if len(unset) > 1:
        raise ValueError(f"max_macs can choose one rank axis, but {', '.join(unset)} have no size: give all but one")
    (name,) = unset
    if is_family(spec) and name == "blocks":
        return _fewest_blocks(lambda blocks: make(blocks=blocks), max_macs, min(in_features, out_features))
    return _largest_rank(lambda rank: make(**{name: rank}), max_macs)


def check_spec(spec: str) -> None:
    """Raise what `structure` would raise at any size: an unknown family or argument, a pattern that cannot be read."""
    if isinstance(spec, Structure):
        raise TypeError(f"a Structure has one size: give its spec, {spec.spec!r}, which is for layers of any size")
    if not is_family(limits.check_text(spec)):
        parse(spec)
        return
    name, arguments = parse_family(spec)
    family = find_family(name)
    family.check(arguments)
    # a builder that needs features may refuse some sizes only
    if not family.needs_features:
        family.pattern(arguments)


def is_family(spec: str) -> bool:
    """Return whether a spec is a family, with or without arguments. Everything else is a pattern."""
    return re.match(r"\s*[\w-]+\s*(\(|$)", spec) is not None


def parse_family(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "btt(rank=2)" into the family's name and the arguments."""
    name = limits.check_text(spec).partition("(")[0].strip()
    find_family(name)
    return name, _ArgumentParser(spec, name).arguments()


class _ArgumentParser(Scanner):
    """Recursive descent over the tokens after the name of a family: ``(rank=2, theta=(1/2, 0, 1/2))``."""

    def __init__(self, spec: str, family: str) -> None:
        super().__init__(spec, _TOKEN, spec.index(family) + len(family))
        self.family = family

    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for _ in self.elements() if self.accept("(") else ():
            start = self.next
            if self.accept("**"):
                raise self.error("** cannot be read here", start)
            if self.kind != "name" or self.tokens[start + 1][1] != "=":
                raise self.error(f"name the argument: {self.family}(argument=value)", start)
            name, _ = self.take(), self.take()
            if name in arguments:
                raise self.error(f"{name} is given twice", start)
            arguments[name] = self.value()
        if self.kind != "end":
            raise self.error(f"expected {self.family}(argument=value, ...)")
        return arguments

    def elements(self) -> Iterator[None]:
        """Read commas and the closing parenthesis; the caller reads an element at every turn."""
        while not self.accept(")"):
            yield
            if not self.accept(","):
                self.expect(")", f"or ',': cannot read the arguments of {self.family}")
                return

    def value(self, nested: int = 0) -> Any:
        start, value = self.next, self.operand(nested)
        while self.accept("/"):
            divisor = self.operand(nested)
            if not {type(value), type(divisor)} <= {int, Fraction} or not divisor:
                raise self.unreadable(start)
            value = Fraction(value) / divisor
        return value

    def operand(self, nested: int) -> Any:
        start, kind = self.next, self.kind
        if nested > _MAX_NESTED:
            raise self.error(f"tuples and minus signs are nested more than {_MAX_NESTED} times")
        if self.accept("-"):
            operand = self.operand(nested + 1)
            if type(operand) not in (int, Fraction):
                raise self.unreadable(start)
            return -operand
        if self.accept("("):
            elements = [self.value(nested + 1) for _ in self.elements()]
            # as in Python, (2) is a number and (2,) a tuple
            is_tuple = len(elements) != 1 or self.tokens[self.next - 2][1] == ","
            return tuple(elements) if is_tuple else elements[0]
        if kind not in ("name", "number", "text"):
            raise self.unreadable(start)
        text = self.take()
        if kind == "number":
            try:
                return _exact(int(text) if text.isdecimal() else float(text))
            except ValueError as error:
                raise self.error(str(error), start) from None
        return text[1:-1] if kind == "text" else {"True": True, "False": False, "None": None}.get(text, text)

    def unreadable(self, token: int) -> PatternError:
        expected = "expected a number, a fraction, a word or a tuple"
        return self.error(f"cannot read the arguments of {self.family}: {expected}", token)


def _exact(value: Any) -> Any:
    """Convert integers to int and floats to fractions, also in tuples, so 1/3 is the same in Python and in text."""
    if isinstance(value, tuple | list):
        return tuple(_exact(element) for element in value)
    number: float | None = limits.as_int(value)
    if number is None and isinstance(value, Real) and not isinstance(value, bool | Fraction):
        number = float(value)
    if number is None:
        return value
    if not abs(number) <= limits.MAX_NUMBER:
        raise ValueError(f"a number must be at most {limits.MAX_NUMBER:.0e}, not {limits.format_number(number)}")
    if isinstance(number, int):
        return number
    simple = Fraction(number).limit_denominator(1000)
    return simple if abs(simple - Fraction(number)) < 1e-12 else Fraction(repr(number))


@lru_cache(maxsize=4096)
def _build(pattern: Pattern, in_features: int, out_features: int, spec: str | None = None) -> Structure:
    """Build the structure of a pattern at one size, of the highest rank, then the fewest MACs, among balanced sizes."""
    spec = spec or str(pattern)
    try:
        best, *others = candidate_sizes(pattern, in_features, out_features)
    except ValueError as error:
        # type(error): a DoesNotFit stays one
        raise type(error)(f"{spec}: {error}") from None
    if others:
        # rank axes of size 1: the other axes stay as they are as the rank grows
        ones = dict.fromkeys(pattern.rank_axes, 1)

        def preference(sizes: Mapping[str, int]) -> tuple[int, int]:
            contractions = [contract(term, {**sizes, **ones}, len(pattern.terms)) for term in pattern.terms]
            rank = sum(contraction.bottleneck for contraction in contractions)
            return min(rank, in_features, out_features), -sum(contraction.macs for contraction in contractions)

        best = max([best, *others], key=preference)
    # the canonical text may be longer than the text that was read
    limits.check_text(spec)
    structure = Structure(spec, in_features, out_features, pattern, tuple(best.items()))
    if structure.macs > limits.MAX_NUMBER:
        raise ValueError(f"{spec}: 10^{len(str(structure.macs)) - 1} MACs for one input are too many")
    return structure


def _fraction(structure: Structure) -> float:
    return structure.macs / (structure.in_features * structure.out_features)


def _within(structure: Structure, max_macs: float | None) -> Structure:
    needed = _fraction(structure)
    if max_macs is not None and needed > max_macs:
        where = f"{structure.spec} at {structure.in_features} -> {structure.out_features}"
        raise OverBudget(f"max_macs={max_macs:g} of dense is too small for {where}: it needs {needed:.4g}")
    return structure


def _largest_rank(make: Callable[[int], Structure], max_macs: float) -> Structure:
    """Find the structure of largest rank within the budget, by doubling and bisection."""
    best, high = _within(make(1), max_macs), 2
    while high <= limits.MAX_SIZE and _fraction(candidate := make(high)) <= max_macs:
        if candidate.macs == best.macs:
            # the pattern makes no use of the rank
            return best
        best, high = candidate, 2 * high
    ranks = range(high // 2, min(high, limits.MAX_SIZE + 1))
    return make(ranks[bisect_right(ranks, max_macs, key=lambda rank: _fraction(make(rank))) - 1])


def _fewest_blocks(make: Callable[[int], Structure], max_macs: float, most: int) -> Structure:
    """Try every number of blocks: many do not fit the features, and padding makes the MACs rise and fall."""
    cheapest: Structure | None = None
    for blocks in range(1, min(most, _MAX_BLOCKS) + 1):
        try:
            candidate = make(blocks)
        except DoesNotFit:
            continue
        if _fraction(candidate) <= max_macs:
            return candidate
        cheapest = min(cheapest or candidate, candidate, key=lambda structure: structure.macs)
    # if no number of blocks fits, the last one raises again
    return _within(cheapest or make(blocks), max_macs)
