"""Sizes of the axes: which integers multiply out to the features.

An axis is fixed by the pattern, or has a target size: features**exponent where the pattern says so, else an equal
share of what the fixed axes of its group leave (balanced). Among the integers that multiply out to the features,
the ones closest to the targets are taken; where none is within a factor of two of every target, the features are
padded by as little as makes one fit. No input feature is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

from einlinear.structures.pattern import Axes, Pattern

MAX_PADDING = 0.15  # of the features; beyond it the structure no longer is what was asked for
_CLOSE = math.log(2) + 1e-9  # how far from its target, as a log ratio, a size may be before padding is preferred
_MAX_ORDERS = 6  # assignments of equally good factors to axes that are handed on to be compared


class DoesNotFit(ValueError):
    """What is asked for does not exist at this size, but may at another one.

    Raised where sizes contradict the features or would pad them too far; a family's builder raises it for features that
    the family has no member for. All other mistakes, such as an unknown family, are wrong at every size: they are plain
    ValueErrors.

    Example:
        >>> import einlinear as el
        >>> def fits(width):
        ...     try:
        ...         return bool(el.structure("dyad(blocks=30)", width, width))
        ...     except el.structures.DoesNotFit:
        ...         return False
        >>> fits(60), fits(64)
        (True, False)
    """


@dataclass(frozen=True)
class Group:
    """Axes that together index the features of one side."""

    side: str  # "in" or "out"
    axes: Axes
    features: int


def groups(pattern: Pattern, in_features: int, out_features: int) -> tuple[Group, ...]:
    """The distinct groups of a pattern: terms that read the same axes in another order count once."""
    found: dict[tuple[str, frozenset[str]], Group] = {}
    for term in pattern.terms:
        for side, axes, features in (("in", term.inputs, in_features), ("out", term.outputs, out_features)):
            found.setdefault((side, frozenset(axes)), Group(side, axes, features))
    return tuple(found.values())


def candidate_sizes(pattern: Pattern, in_features: int, out_features: int) -> Iterator[dict[str, int]]:
    """Yield the size of every axis, equally good assignments one after another, the preferred order first.

    Raises:
        DoesNotFit: fixed sizes contradict the features, or padding would exceed MAX_PADDING.
        ValueError: a rank axis has no size.
    """
    all_groups = groups(pattern, in_features, out_features)
    given = dict(pattern.sizes)
    fixed: dict[str, int] = {}
    targets: dict[str, float] = {}
    for axis in pattern.axes:
        owners = [group for group in all_groups if axis in group.axes]
        features = min((group.features for group in owners), default=min(in_features, out_features))
        size = given.get(axis)
        if size is None:
            if not owners:
                raise ValueError(
                    f"axis {axis!r} is neither read nor written, so its size must be given: 'where {axis}=2' in the "
                    f'pattern, or sizes={{"{axis}": 2}}'
                )
        elif size.exponent in (0, 1):
            fixed[axis] = max(1, math.floor(size.of(features)))
        elif owners:
            targets[axis] = size.of(features)
        else:
            fixed[axis] = max(1, math.ceil(size.of(features) - 1e-9))  # 64**(1/3) is 3.9999...96 in floats

    for axis in pattern.axes:  # an axis of several groups must divide each of them
        owners = [group for group in all_groups if axis in group.axes]
        if len(owners) > 1 and axis not in fixed:
            fixed[axis] = _shared_size(axis, owners, fixed, targets)

    options: list[list[dict[str, int]]] = []
    for group in all_groups:
        free = [axis for axis in group.axes if axis not in fixed]
        known = math.prod(fixed[axis] for axis in group.axes if axis in fixed)
        remaining = math.ceil(group.features / known)
        if not free:
            _check_padding(group, known, fixed)
            options.append([{}])
            continue
        _check_padding(group, known * remaining, fixed)
        wanted = _targets(free, targets, group.features / known)
        limit = max(remaining, math.floor(group.features * (1 + MAX_PADDING) / known))
        options.append([dict(zip(free, sizes)) for sizes in _closest(remaining, limit, wanted, group.side == "in")])
    for choice in product(*options):
        sizes = dict(fixed)
        for part in choice:
            sizes.update(part)
        yield {axis: sizes[axis] for axis in pattern.axes}


def _targets(free: list[str], targets: Mapping[str, float], features: float) -> tuple[float, ...]:
    """What each free axis should measure: its own target, or an equal share of what these leave."""
    own = {axis: targets[axis] for axis in free if axis in targets}
    shared = len(free) - len(own)
    rest = max(1.0, features / math.prod(own.values())) ** (1 / shared) if shared else 1.0
    return tuple(own.get(axis, rest) for axis in free)


def _shared_size(axis: str, owners: list[Group], fixed: Mapping[str, int], targets: Mapping[str, float]) -> int:
    for group in owners:  # where all others are fixed, this one follows
        others = [other for other in group.axes if other != axis]
        if all(other in fixed for other in others):
            return math.ceil(group.features / math.prod(fixed[other] for other in others))
    target = targets.get(axis) or min(group.features ** (1 / len(group.axes)) for group in owners)
    common = math.gcd(*(group.features for group in owners))
    best = min(_divisors(common), key=lambda size: abs(math.log(size / target)))
    return best if abs(math.log(best / target)) <= _CLOSE else max(1, round(target))


def _check_padding(group: Group, total: int, fixed: Mapping[str, int]) -> None:
    known = {axis: fixed[axis] for axis in group.axes if axis in fixed}
    named = ", ".join(f"{axis}={size}" for axis, size in known.items())
    if total < group.features:
        raise DoesNotFit(
            f"the sizes {named} multiply to {total}, fewer than {group.side}_features={group.features}: "
            "give larger sizes, or leave one axis free"
        )
    if total - group.features > MAX_PADDING * group.features:
        step = math.prod(known.values())
        down, up = group.features // step * step, math.ceil(group.features / step) * step
        nearby = " and ".join(str(size) for size in dict.fromkeys((down, up)) if size)
        raise DoesNotFit(
            f"{group.side}_features={group.features} is not divisible by {step} (the axes {named}) and would be padded "
            f"to {total}, by more than {MAX_PADDING:.0%}; nearby sizes that fit: {nearby}"
        )


@lru_cache(maxsize=4096)
def _closest(features: int, limit: int, targets: tuple[float, ...], descending: bool) -> list[tuple[int, ...]]:
    """Ordered factorisations closest to the targets, all equally close, of the fewest features that allow one."""
    fallback: tuple[float, list[tuple[int, ...]]] = (math.inf, [])
    for padded in range(features, limit + 1):
        distance, found = _closest_exact(padded, targets)
        if max(abs(math.log(size / target)) for size, target in zip(found[0], targets)) <= _CLOSE:
            break
        if distance < fallback[0] - 1e-9:
            fallback = (distance, found)
    else:
        found = fallback[1]
    return sorted(found, reverse=descending)[:_MAX_ORDERS]


def _closest_exact(features: int, targets: tuple[float, ...]) -> tuple[float, list[tuple[int, ...]]]:
    best, found = math.inf, list[tuple[int, ...]]()
    for sizes in _factorisations(features, len(targets)):
        # four and more axes: only the two monotone orders, for the number of orders grows as the factorial
        orders = set(permutations(sizes)) if len(sizes) <= 3 else {sizes, sizes[::-1]}
        for order in orders:
            distance = sum(math.log(size / target) ** 2 for size, target in zip(order, targets))
            if distance < best - 1e-9:
                best, found = distance, []
            if distance < best + 1e-9:
                found.append(order)
    return best, found


@lru_cache(maxsize=65536)
def _factorisations(n: int, count: int, smallest: int = 1) -> tuple[tuple[int, ...], ...]:
    """All non-decreasing tuples of `count` integers, each at least `smallest`, with product n."""
    if count == 1:
        return ((n,),) if n >= smallest else ()
    return tuple(
        (first, *rest)
        for first in _divisors(n)
        if first >= smallest and first**count <= n
        for rest in _factorisations(n // first, count - 1, first)
    )


@lru_cache(maxsize=65536)
def _divisors(n: int) -> tuple[int, ...]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return tuple(small + [n // i for i in reversed(small) if i * i != n])
