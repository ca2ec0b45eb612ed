"""Sizes of the axes: which integers multiply out to the features.

An axis is fixed by the pattern, or has a target size: features**exponent where the pattern says so, else an equal
share of what the fixed axes of its group leave (balanced). Among the integers that multiply out to the features,
the ones closest to the targets are taken; where none is within a factor of two of every target, the features are
padded by as little as makes one fit. No input feature is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

from einlinear.structures import limits
from einlinear.structures.pattern import Axes, Pattern

MAX_PADDING = 0.15  # of the features; beyond it the structure no longer is what was asked for
_CLOSE = math.log(2) + 1e-9  # how far from its target, as a log ratio, a size may be before padding is preferred
_MAX_ORDERS = 6  # assignments of equally good factors to axes that are handed on to be compared
_MAX_CANDIDATES = 1024
# How much is tried before the best so far is taken: that bounds the time for sizes that nothing fits.
_MAX_TRIED = 65536  # padded feature counts whose prime factors are small enough
_MAX_FAR = 1024  # padded feature counts, where no sizes are close to their targets
_MAX_STEPS = 65536  # sizes of an axis
_DENSE = 64  # below this limit numbers without larger prime factors are so rare that they are multiplied up
_ANY = 4096  # above this one most numbers do


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
        ValueError: a rank axis has no size, or an axis a size that is out of all reason.
    """
    axes = pattern.axes
    all_groups = groups(pattern, in_features, out_features)
    given = dict(pattern.sizes)
    fixed: dict[str, int] = {}
    targets: dict[str, float] = {}
    for axis in axes:
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

    for axis in axes:  # an axis of several groups must divide each of them
        owners = [group for group in all_groups if axis in group.axes]
        if len(owners) > 1 and axis not in fixed:
            fixed[axis] = _shared_size(axis, owners, fixed, targets)

    options: list[list[dict[str, int]]] = []
    candidates = 1
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
        effort = 1 / max(1, len(all_groups) // 4)
        choices = [dict(zip(free, sizes)) for sizes in _closest(remaining, limit, wanted, group.side == "in", effort)]
        if candidates * len(choices) > _MAX_CANDIDATES:
            choices = choices[:1]
        candidates *= len(choices)
        options.append(choices)
    for choice in product(*options):
        sizes = dict(fixed)
        for part in choice:
            sizes.update(part)
        yield {axis: sizes[axis] for axis in axes}


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
def _closest(
    features: int, limit: int, targets: tuple[float, ...], descending: bool, effort: float
) -> list[tuple[int, ...]]:
    """Ordered factorisations closest to the targets, all equally close, of the fewest features that allow one."""
    if len(targets) == 1:
        return [(min(max(features, math.ceil(targets[0] * math.exp(-_CLOSE))), limit),)]
    search = _Search(targets, int(effort * _MAX_STEPS))
    possible, ways = math.prod(targets), 2 ** len(targets) * 1.01
    if possible / ways <= limit and features <= possible * ways:
        for padded in _smooth_numbers(features, limit, 2 * max(targets) + 1, int(effort * _MAX_TRIED)):
            _, found = search.closest(padded)
            if max(abs(math.log(size / target)) for size, target in zip(found[0], targets)) <= _CLOSE:
                return sorted(found, reverse=descending)[:_MAX_ORDERS]
            if search.steps <= 0:
                break
    search.steps = int(effort * _MAX_STEPS)
    best, closest = math.inf, list[tuple[int, ...]]()
    for padded in range(features, min(limit, features + _MAX_FAR) + 1):
        distance, found = search.closest(padded, best)
        if distance < best - _EQUAL:
            best, closest = distance, found
        if search.steps <= 0:
            break
    return sorted(closest, reverse=descending)[:_MAX_ORDERS]


def _smooth_numbers(first: int, last: int, largest: float, tried: int) -> Iterator[int]:
    """The numbers from first to last, in order, without a prime factor above `largest`: no axis could hold it."""
    if largest > _ANY:
        yield from range(first, last + 1)
        return
    primes = [p for p in _primes() if p <= largest]
    if largest > _DENSE:
        product = math.prod(primes)
        for number in range(first, min(last, first + tried) + 1):
            rest = number
            while (common := math.gcd(rest, product)) > 1:
                rest //= common
            if rest == 1:
                yield number
        return
    numbers = [1]
    for prime in primes:
        for number in numbers:  # which grows meanwhile
            if number * prime <= last:
                numbers.append(number * prime)
    yield from sorted(number for number in numbers if number >= first)


_EQUAL = 1e-9  # difference of distances


class _Search:
    """Looks for the sizes of a given product that are closest to the targets: least squares of log ratios.

    Of up to three axes all orders are compared; of more only the two monotone ones, for the number of orders grows as
    the factorial. Branch and bound: what is left of the product is, at the best, spread evenly over the axes left.
    """

    def __init__(self, targets: tuple[float, ...], steps: int) -> None:
        self.targets, self.steps = targets, steps
        self.best, self.found = math.inf, set[tuple[int, ...]]()

    def closest(self, features: int, below: float = math.inf) -> tuple[float, list[tuple[int, ...]]]:
        """The least distance below a bound, and all sizes of this distance; those found when the steps are used up."""
        self.best, self.found = below, set()
        divisors = _divisors(features)
        self.steps -= 1 + math.isqrt(features) // 256  # by the time that the divisors take
        logs = [math.log(target) for target in self.targets]
        self._extend((), features, logs, 0.0, divisors, False)
        if len(logs) > 3:
            self._extend((), features, logs[::-1], 0.0, divisors, True)
        return self.best, list(self.found)

    def _extend(
        self, sizes: tuple[int, ...], rest: int, logs: list[float], distance: float, divisors: Sequence[int], back: bool
    ) -> None:
        """Choose the size of the next axis, the ones nearest to an even share first."""
        monotone, left = len(logs) > 3, len(logs) - len(sizes)
        target = logs[len(sizes)]
        excess = math.log(rest) - sum(logs[len(sizes) :])
        if distance + excess**2 / left >= self.best + _EQUAL:
            return
        if left == 1:
            distance += excess**2
            if distance < self.best - _EQUAL:
                self.best, self.found = distance, set()
            self.found.add((*sizes, rest)[::-1] if back else (*sizes, rest))
            return
        smallest = sizes[-1] if monotone and sizes else 1
        divisors = [d for d in divisors if rest % d == 0 and d >= smallest]
        fit = [d for d in divisors if d**left <= rest] if monotone else divisors
        for size in sorted(fit, key=lambda size: abs(math.log(size) - target - excess / left)):
            if self.steps <= 0 and self.found:
                return
            self.steps -= 1
            cost = (math.log(size) - target) ** 2
            self._extend((*sizes, size), rest // size, logs, distance + cost, divisors, back)


@lru_cache(maxsize=65536)
def _divisors(n: int) -> tuple[int, ...]:
    found, rest = [1], n
    for prime in _primes():
        if prime * prime > rest:
            break
        powers = [1]
        while rest % prime == 0:
            rest //= prime
            powers.append(powers[-1] * prime)
        found = [divisor * power for divisor in found for power in powers]
    return tuple(sorted(found + [divisor * rest for divisor in found] if rest > 1 else found))


@cache
def _primes() -> tuple[int, ...]:
    """Those up to the square root of the most features."""
    sieve = bytearray([1]) * (math.isqrt(limits.MAX_SIZE * 2) + 1)
    for n in range(2, math.isqrt(len(sieve)) + 1):
        sieve[n * n :: n] = bytes(len(sieve[n * n :: n]))
    return tuple(n for n in range(2, len(sieve)) if sieve[n])
