"""Specs: from the text that a user writes, ``"btt(rank=2)"`` or a pattern, to a `Structure`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from numbers import Real
from typing import Any

from einlinear.structures import limits
from einlinear.structures.arguments import exact, parse_arguments
from einlinear.structures.budget import fewest_blocks, largest_rank, within
from einlinear.structures.families import Family, find_family
from einlinear.structures.pattern import Pattern, parse
from einlinear.structures.structured_matrix import Structure, build


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
        spec: a family, ``"btt(rank=2)"`` or ``"btt"``, or a pattern, ``"(g a), g r f a, f e g r -> (f e)"``.
        in_features, out_features: the size of the layer, integers of any kind up to 2^31 - 1.
        max_macs: a fraction of the MACs of dense, at most 1. The argument that spends compute is chosen as rich as this
            budget allows, if it is not set: the rank of a family, else its number of blocks; the one rank axis of a
            pattern that has no size.
        sizes: sizes of axes of a pattern, by name.
        **arguments: arguments of the family, as if written in the spec.

    Raises:
        DoesNotFit: the sizes contradict the features, or the features would have to be padded by more than 15 %: there
            is no such structure at this size.
        ValueError: an unknown family (the error suggests the nearest) or argument, a pattern that cannot be read (the
            error points at the mistake), a budget that is too small, or more text, terms, axes or factors than any real
            structure has (`structures/limits.py`). DoesNotFit is a ValueError as well.
        TypeError: an argument of the wrong type.

    Example:
        >>> import einlinear as el
        >>> s = el.structure("btt(rank=2)", 1024, 4096)
        >>> s.params, s.macs, s.rank
        (393216, 393216, 1024)
        >>> el.structure("btt", 1024, 4096, max_macs=0.25).spec
        'btt(rank=5)'
    """
    spec = _check_type(spec.spec if isinstance(spec, Structure) else spec)
    in_features = limits.validate_size("in_features", in_features)
    out_features = limits.validate_size("out_features", out_features)
    if max_macs is not None:
        max_macs = _validate_budget(max_macs)
    if is_family(spec):
        if sizes is not None:
            raise ValueError(f"sizes= belongs to a pattern; the family in {spec!r} takes arguments by name")
        name, written = parse_family(spec)
        twice = written.keys() & arguments.keys()
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is given twice: in {spec!r} and as an argument")
        arguments = written | {argument: exact(value) for argument, value in arguments.items()}
        return _from_family(find_family(name), arguments, in_features, out_features, max_macs)
    if arguments:
        raise ValueError(
            f"a pattern takes no arguments, not {', '.join(arguments)}=: write sizes into it, as in 'where r=2', or "
            'give them as sizes={"r": 2}'
        )
    pattern = parse(" ".join(spec.split())).with_sizes(sizes or {})
    return _from_pattern(pattern, in_features, out_features, max_macs)


def check_spec(spec: str) -> None:
    """Raise what `structure` would raise at any size: an unknown family or argument, a pattern that cannot be read."""
    if isinstance(spec, Structure):
        raise TypeError(f"a Structure has one size: give its spec, {spec.spec!r}, which is for layers of any size")
    _check_type(spec)
    if not is_family(spec):
        parse(" ".join(spec.split()))
        return
    name, arguments = parse_family(spec)
    family = find_family(name)
    family.check(arguments)
    # a builder that takes features may refuse some sizes only
    if not family.features:
        family.pattern(arguments, 1, 1)


def is_family(spec: str) -> bool:
    """Return whether a spec is a family, with or without arguments. Everything else is a pattern."""
    return re.match(r"\s*[\w-]+\s*(\(|$)", spec) is not None


def parse_family(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "btt(rank=2)" into the family's name and the arguments. Raises ValueError that points at a mistake."""
    limits.check_text(spec)
    name = spec.partition("(")[0].strip()
    find_family(name)
    return name, parse_arguments(spec, name)


def _check_type(spec: Any) -> str:
    if not isinstance(spec, str):
        raise TypeError(f"a structure is given as text such as 'btt(rank=2)', not {spec!r}")
    limits.check_text(spec)
    return spec


def _validate_budget(max_macs: float) -> float:
    if not isinstance(max_macs, Real) or isinstance(max_macs, bool) or not 0 < max_macs <= 1:
        shown = limits.format_int(max_macs) if isinstance(max_macs, int) else repr(max_macs)
        raise ValueError(
            f"max_macs is a fraction of the MACs of dense, above 0 and at most 1, such as 0.25, not {shown}"
        )
    return float(max_macs)


def _from_pattern(pattern: Pattern, in_features: int, out_features: int, max_macs: float | None) -> Structure:
    unset = [axis for axis in pattern.rank_axes if axis not in dict(pattern.sizes)]
    if max_macs is None or not unset:
        return within(_build(pattern, in_features, out_features), max_macs)
    if len(unset) > 1:
        raise ValueError(f"max_macs can choose one rank axis, but {', '.join(unset)} have no size: give all but one")
    (axis,) = unset
    return largest_rank(lambda rank: _build(pattern.with_sizes({axis: rank}), in_features, out_features), max_macs)


def _from_family(
    family: Family, arguments: Mapping[str, Any], in_features: int, out_features: int, max_macs: float | None
) -> Structure:
    def make(**chosen: int) -> Structure:
        every = {**arguments, **chosen}
        return _build(family.pattern(every, in_features, out_features), in_features, out_features, family.spec(every))

    unset = [name for name in ("rank", "blocks") if name in family.defaults and name not in arguments]
    if max_macs is None or not unset:
        return within(make(), max_macs)
    if unset[0] == "rank":
        return largest_rank(lambda rank: make(rank=rank), max_macs)
    return fewest_blocks(lambda blocks: make(blocks=blocks), min(in_features, out_features), max_macs)


@lru_cache(maxsize=4096)
def _build(pattern: Pattern, in_features: int, out_features: int, spec: str | None = None) -> Structure:
    try:
        return build(pattern, in_features, out_features, spec)
    except ValueError as error:
        # type(error): a DoesNotFit stays one
        raise type(error)(f"{spec or pattern}: {error}") from None
