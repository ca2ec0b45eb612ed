"""Sizes of the axes: integers close to the targets of the pattern, with as little padding as possible."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from einlinear.structures import limits
from einlinear.structures.pattern import Axes, Pattern

Sizes = tuple[int, ...]

# padding as a fraction of the features
MAX_PADDING = 0.15
# log ratio of a size and its target above which padding is preferred, and distances that count as equal
_CLOSE, _EQUAL = math.log(2) + 1e-9, 1e-9
# orders of equally good sizes in one group, and assignments to all groups, that are compared
_MAX_ORDERS, _MAX_CANDIDATES = 6, 1024
# limits of the search, after which the best sizes so far are taken: padded feature counts, and sizes of an axis
_MAX_FAR, _MAX_STEPS = 1024, 65536


class DoesNotFit(ValueError):
    """The structure does not exist at this size, but may at another. Mistakes at every size are plain ValueErrors."""


class Group(NamedTuple):
    """Axes that together index the features of one side, "in" or "out"."""

    side: str
    axes: Axes
    features: int


def groups(pattern: Pattern, in_features: int, out_features: int) -> tuple[Group, ...]:
    """Return the distinct groups of a pattern. The same axes in another order are the same group."""
    distinct: dict[tuple[str, frozenset[str]], Group] = {}
    for term in pattern.terms:
        for side, axes, features in (("in", term.inputs, in_features), ("out", term.outputs, out_features)):
            distinct.setdefault((side, frozenset(axes)), Group(side, axes, features))
    return tuple(distinct.values())


def candidate_sizes(pattern: Pattern, in_features: int, out_features: int) -> Iterator[dict[str, int]]:
    """Yield equally good assignments of a size to every axis, the preferred one first.

    Axes are fixed by the pattern, or have a target: features**exponent, else an equal share of the features that the
    other axes of the group leave. Raises DoesNotFit if fixed sizes contradict the features or need too much padding.
    """
    all_groups, named = groups(pattern, in_features, out_features), dict(pattern.sizes)
    owners = {axis: [group for group in all_groups if axis in group.axes] for axis in pattern.axes}
    fixed: dict[str, int] = {}
    targets: dict[str, float] = {}
    for axis in pattern.axes:
        features = min((group.features for group in owners[axis]), default=min(in_features, out_features))
        if axis in named:
            size, is_power = named[axis].of(features), named[axis].exponent not in (0, 1)
            if owners[axis] and is_power:
                targets[axis] = size
            else:
                # 64**(1/3) is 3.9999...96 in floats
                fixed[axis] = max(1, math.ceil(size - 1e-9) if is_power else math.floor(size))
        elif not owners[axis]:
            advice = f"its size must be given: 'where {axis}=2' in the pattern, or sizes={{'{axis}': 2}}"
            raise ValueError(f"axis {axis!r} is neither read nor written, so {advice}")
    for axis in pattern.axes:
        # an axis of several groups must divide each of them
        if len(owners[axis]) > 1 and axis not in fixed:
            fixed[axis] = _shared_size(axis, owners[axis], fixed, targets)

    options: list[list[dict[str, int]]] = []
    for group in all_groups:
        sizes = {axis: fixed[axis] for axis in group.axes if axis in fixed}
        free = [axis for axis in group.axes if axis not in fixed]
        step = math.prod(sizes.values())
        remaining = math.ceil(group.features / step)
        _check_padding(group, step * remaining if free else step, sizes)
        if free:
            powers = math.prod(targets.get(axis, 1.0) for axis in free)
            balanced = sum(axis not in targets for axis in free)
            share = max(1.0, group.features / step / powers) ** (1 / max(1, balanced))
            goals = tuple(targets.get(axis, share) for axis in free)
            limit = max(remaining, math.floor(group.features * (1 + MAX_PADDING) / step))
            effort = 1 / max(1, len(all_groups) // 4)
            closest = _closest(remaining, limit, goals, group.side == "in", effort)
            few = math.prod(map(len, options)) * len(closest) <= _MAX_CANDIDATES
            options.append([dict(zip(free, values)) for values in (closest if few else closest[:1])])
    for choice in itertools.product(*options):
        every = dict(itertools.chain(fixed.items(), *map(dict.items, choice)))
        yield {axis: every[axis] for axis in pattern.axes}


def greedy_sizes(features: int, count: int) -> Sizes:
    """Factorise as the code of arXiv 2406.06248: the prime factors, in ascending order, go to the smallest size so far.

    >>> greedy_sizes(768, 2)
    (16, 48)
    """
    sizes = [1] * count
    for prime in _prime_factors(features):
        sizes[sizes.index(min(sizes))] *= prime
    return tuple(sorted(sizes))


def _shared_size(axis: str, owners: list[Group], fixed: Mapping[str, int], targets: Mapping[str, float]) -> int:
    for group in owners:
        # if all other axes of the group are fixed, this one follows
        others = [other for other in group.axes if other != axis]
        if all(other in fixed for other in others):
            return math.ceil(group.features / math.prod(fixed[other] for other in others))
    target = targets.get(axis) or min(group.features ** (1 / len(group.axes)) for group in owners)
    common = math.gcd(*(group.features for group in owners))
    best = min(_divisors(common), key=lambda size: abs(math.log(size / target)))
    return best if abs(math.log(best / target)) <= _CLOSE else max(1, round(target))


def _check_padding(group: Group, total: int, sizes: Mapping[str, int]) -> None:
    features, named = group.features, ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    given = f"{group.side}_features={features}"
    if total < features:
        raise DoesNotFit(f"the sizes {named} multiply to {total}, fewer than {given}: enlarge or free an axis")
    if total - features > MAX_PADDING * features:
        step = math.prod(sizes.values())
        down, up = features // step * step, math.ceil(features / step) * step
        nearby = f"{down} and {up}" if 0 < down < up else str(up)
        padded = f"padded to {total}, by more than {MAX_PADDING:.0%}; nearby sizes that fit: {nearby}"
        raise DoesNotFit(f"{given} is not divisible by {step} (the axes {named}) and would be {padded}")


@lru_cache(maxsize=4096)
def _closest(features: int, limit: int, targets: tuple[float, ...], descending: bool, effort: float) -> list[Sizes]:
    """Return the equally close factorisations of the fewest features from `features` to `limit`."""
    if len(targets) == 1:
        return [(min(max(features, math.ceil(targets[0] * math.exp(-_CLOSE))), limit),)]
    search = _Search(targets, int(effort * _MAX_STEPS))
    product, slack = math.prod(targets), 2 ** len(targets) * 1.01
    if product / slack <= limit and features <= product * slack:
        for padded in _smooth_numbers(features, limit, 2 * max(targets) + 1):
            _, closest = search.closest(padded)
            if max(abs(math.log(size / target)) for size, target in zip(closest[0], targets)) <= _CLOSE:
                return sorted(closest, reverse=descending)[:_MAX_ORDERS]
            if search.steps <= 0:
                break
    search.steps = int(effort * _MAX_STEPS)
    best, closest = math.inf, list[Sizes]()
    for padded in range(features, min(limit, features + _MAX_FAR) + 1):
        distance, candidates = search.closest(padded, best)
        if distance < best - _EQUAL:
            best, closest = distance, candidates
        if search.steps <= 0:
            break
    return sorted(closest, reverse=descending)[:_MAX_ORDERS]


def _smooth_numbers(first: int, last: int, largest: float) -> Iterator[int]:
    """Yield the numbers from first to last, without those of a prime factor above `largest` where these are many."""
    if largest > 64:
        yield from range(first, last + 1)
        return
    numbers = [1]
    for prime in itertools.takewhile(lambda prime: prime <= largest, _primes()):
        # the list grows during iteration
        for number in numbers:
            if number * prime <= last:
                numbers.append(number * prime)
    yield from sorted(number for number in numbers if number >= first)


class _Search:
    """Branch and bound for the sizes of a given product closest to the targets: least squares of log ratios."""

    def __init__(self, targets: tuple[float, ...], steps: int) -> None:
        self.targets, self.steps = targets, steps
        self.best, self.closest_sizes = math.inf, set[Sizes]()

    def closest(self, features: int, below: float = math.inf) -> tuple[float, list[Sizes]]:
        """Return the least distance below a bound, and all sizes of this distance, or the best within the steps."""
        self.best, self.closest_sizes = below, set()
        divisors = _divisors(features)
        # about the time that the divisors take
        self.steps -= 1 + math.isqrt(features) // 256
        logs = [math.log(target) for target in self.targets]
        self._extend((), features, logs, 0.0, divisors, False)
        # of more than three axes only the two monotone orders: their number grows as the factorial
        if len(logs) > 3:
            self._extend((), features, logs[::-1], 0.0, divisors, True)
        return self.best, list(self.closest_sizes)

    def _extend(
        self, sizes: Sizes, rest: int, logs: list[float], distance: float, divisors: Sequence[int], back: bool
    ) -> None:
        """Choose the size of the next axis: sizes nearest to an even share first."""
        monotone, left = len(logs) > 3, len(logs) - len(sizes)
        target = logs[len(sizes)]
        excess = math.log(rest) - sum(logs[len(sizes) :])
        if distance + excess**2 / left >= self.best + _EQUAL:
            return
        if left == 1:
            distance += excess**2
            if distance < self.best - _EQUAL:
                self.best, self.closest_sizes = distance, set()
            self.closest_sizes.add((*sizes, rest)[::-1] if back else (*sizes, rest))
            return
        smallest = sizes[-1] if monotone and sizes else 1
        divisors = [d for d in divisors if rest % d == 0 and d >= smallest]
        fit = [d for d in divisors if d**left <= rest] if monotone else divisors
        for size in sorted(fit, key=lambda size: abs(math.log(size) - target - excess / left)):
            if self.steps <= 0 and self.closest_sizes:
                return
            self.steps -= 1
            cost = (math.log(size) - target) ** 2
            self._extend((*sizes, size), rest // size, logs, distance + cost, divisors, back)


@lru_cache(maxsize=65536)
def _divisors(n: int) -> tuple[int, ...]:
    divisors = {1}
    for prime in _prime_factors(n):
        divisors |= {divisor * prime for divisor in divisors}
    return tuple(sorted(divisors))


def _prime_factors(n: int) -> Iterator[int]:
    """Yield the prime factors in ascending order, each as often as it divides n."""
    for prime in _primes():
        if prime * prime > n:
            break
        while n % prime == 0:
            yield prime
            n //= prime
    if n > 1:
        yield n


@cache
def _primes() -> tuple[int, ...]:
    """Return the primes up to the square root of the largest padded number of features."""
    sieve = bytearray([1]) * (math.isqrt(limits.MAX_SIZE * 2) + 1)
    for n in range(2, math.isqrt(len(sieve)) + 1):
        sieve[n * n :: n] = bytes(len(sieve[n * n :: n]))
    return tuple(n for n in range(2, len(sieve)) if sieve[n])
