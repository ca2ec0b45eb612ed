"""From what a user writes to a `Structure`: "btt(rank=2)", a pattern, a compute budget."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

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
        in_features, out_features: the size of the layer.
        max_macs: a fraction of the MACs of dense, at most 1. What spends compute and is not given is chosen as rich as
            this budget allows: of a family the rank, else the number of blocks; of a pattern its one rank axis without
            a size.
        sizes: sizes of axes of a pattern, by name.
        **arguments: arguments of the family, as if written in the spec.

    Raises:
        DoesNotFit: sizes that contradict the features, or features that would have to be padded by more than 15 %:
            there is no such structure at this size.
        ValueError: an unknown family (the nearest is named) or argument, a pattern that cannot be read (the place is
            shown), a budget that is too small. DoesNotFit is one as well.
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
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(features, int) or isinstance(features, bool):
            raise TypeError(f"{name} must be an int, not {features!r}")
        if features < 1:
            raise ValueError(f"{name} must be at least 1, not {features}")
    if max_macs is not None and not (isinstance(max_macs, int | float) and 0 < max_macs <= 1):
        raise ValueError(
            f"max_macs is a fraction of the MACs of dense, above 0 and at most 1, such as 0.25, not {max_macs!r}"
        )
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
    given = {name: _number(value) for name, value in arguments.items()}
    return _from_family(family, written | given, in_features, out_features, max_macs)


def is_family(spec: str) -> bool:
    """Whether a spec names a family, alone or with a bracket; all else is a pattern."""
    return re.fullmatch(r"\s*[\w-]+\s*(\(.*)?", spec, re.DOTALL) is not None


def parse_family(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "btt(rank=2)" into the family's name and the arguments. Raises ValueError that points at a mistake."""
    name, bracket, rest = spec.partition("(")
    find_family(name.strip())
    start = len(name)
    try:
        call = ast.parse(f"f{bracket}{rest}".strip(), mode="eval").body
    except SyntaxError as error:
        raise PatternError(
            f"cannot read the arguments of {name.strip()}", spec, start + (error.offset or 1) - 2
        ) from None
    if isinstance(call, ast.Name) and not bracket:
        return name.strip(), {}
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise PatternError(f"expected {name.strip()}(argument=value, ...)", spec, start)
    if call.args:
        raise PatternError(
            f"name the argument: {name.strip()}(argument=value)", spec, start + call.args[0].col_offset - 1
        )
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            message = f"{keyword.arg} is given twice" if keyword.arg else "** cannot be read here"
            raise PatternError(message, spec, start + keyword.col_offset - 1)
        arguments[keyword.arg] = _value(keyword.value, spec, start)
    return name.strip(), arguments


def _value(node: ast.expr, spec: str, start: int) -> Any:
    """A number, a fraction such as 1/2, a word, or a tuple of these."""
    if isinstance(node, ast.Constant):
        return _number(node.value)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand, spec, start)
        if isinstance(operand, int | Fraction):
            return -operand
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        left, right = _value(node.left, spec, start), _value(node.right, spec, start)
        if isinstance(left, int | Fraction) and isinstance(right, int | Fraction) and right:
            return Fraction(left) / right
    if isinstance(node, ast.Tuple):
        return tuple(_value(element, spec, start) for element in node.elts)
    raise PatternError("expected a number, a fraction, a word or a tuple", spec, start + node.col_offset - 1)


def _number(value: Any) -> Any:
    """Floats as the fractions they stand for, so that 1/3 in Python and in text are the same structure."""
    if isinstance(value, tuple | list):
        return tuple(_number(element) for element in value)
    if isinstance(value, float):
        simple = Fraction(value).limit_denominator(1000)
        return simple if abs(simple - Fraction(value)) < 1e-12 else Fraction(repr(value))
    return value


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
