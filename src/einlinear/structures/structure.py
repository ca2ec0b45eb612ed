"""`Structure`: what a structured matrix of one size is, as plain numbers and names. No tensors here."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import TypeVar

from einlinear.structures import counts
from einlinear.structures.limits import MAX_NUMBER, check_text
from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.sizes import candidate_sizes, groups

T = TypeVar("T")


@dataclass(frozen=True)
class Factor:
    """One factor of a structured matrix, and its part in the contraction.

    Attributes:
        name: A, B, C, ... in the order the pattern writes them; also the name of the layer's parameter.
        axes: the axes as the pattern writes them.
        shape: their sizes, the shape of the parameter.
        before, after: the axes of the state that its step reads, and of the one that the step leaves.
        batch, summed: the axes that it shares with the state and leaves in it, and those that it sums away.
        columns: the axes that only the state has: the same matrices serve all of them.
        introduced: the axes that it adds to the state.
        fan_in, fan_out: the products of the sizes of `summed` and of `introduced`.
        macs: multiply-accumulates of this step for one input vector.
    """

    name: str
    axes: Axes
    shape: tuple[int, ...]
    before: Axes
    after: Axes
    batch: Axes
    summed: Axes
    columns: Axes
    introduced: Axes
    fan_in: int
    fan_out: int
    macs: int

    @property
    def params(self) -> int:
        """The number of entries of the factor."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """The size of the state that this step leaves, for one input vector."""
        return self.macs // self.fan_in


@dataclass(frozen=True)
class Term:
    """One summand: the axes it reads, its factors in order of contraction, the axes it writes."""

    inputs: Axes
    factors: tuple[Factor, ...]
    outputs: Axes

    @property
    def state_size(self) -> int:
        """The size of all states between its steps, for one input vector."""
        return sum(factor.width for factor in self.factors[:-1])


@dataclass(frozen=True)
class Structure:
    """A structured matrix of shape (out_features, in_features). Made by `einlinear.structure`; immutable, hashable.

    Attributes:
        spec: canonical text; `structure(spec, in_features, out_features)` gives an equal structure.
        in_features, out_features: the shape of the matrix.
        pattern: the parsed pattern the spec stands for; `str` gives its text.
        terms: what is summed.
        sizes: (axis, size) pairs of all axes.
        psi, nu, omega: exponents of rank = n^psi, MACs = n^(1 + nu) and parameters / MACs = n^-omega, after
            Potapczynski et al., arXiv 2410.02117. They are asymptotic, for in_features = out_features = n, with named
            sizes (``rank=4``, ``blocks=4``) held fixed and balanced axes growing; where all axes of the input or of the
            output have a fixed size, those axes count with the exponents they have at this size. The factors are taken
            in the order they are written in, as in the paper; a theta that is cheaper the other way around (one that
            the paper does not admit) can have a smaller rank than psi says, which `rank` gives exactly.
    """

    spec: str
    in_features: int
    out_features: int
    pattern: Pattern
    terms: tuple[Term, ...]
    sizes: tuple[tuple[str, int], ...]
    psi: float
    nu: float
    omega: float

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of all terms, in order of contraction."""
        return tuple(factor for term in self.terms for factor in term.factors)

    def by_term(self, entries: Sequence[T]) -> list[tuple[Term, Sequence[T]]]:
        """The terms, each with its part of a sequence that has an entry for each of `factors`, in their order.

        >>> import einlinear as el
        >>> [part for _, part in el.structure("i, r i, o r -> o + i, o i -> o where r=2", 4, 4).by_term("XYZ")]
        ['XY', 'Z']

        Raises:
            ValueError: more or fewer entries than factors.
        """
        parts, first = [], 0
        for term in self.terms:
            parts.append((term, entries[first : first + len(term.factors)]))
            first += len(term.factors)
        if len(entries) != first:
            raise ValueError(f"{self} has {first} factors, not {len(entries)}")
        return parts

    @property
    def params(self) -> int:
        """Entries of all factors, as stored (the bias is not counted)."""
        return sum(factor.params for factor in self.factors)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one input vector, as computed, padding included."""
        return sum(factor.macs for factor in self.factors)

    @cached_property
    def rank(self) -> int:
        """The rank of the matrix for almost all values of the factors.

        Where features are padded and there are many axes it is an upper bound, off by less than the padding.
        """
        return counts.generic_rank(self.pattern.terms, dict(self.sizes), self.in_features, self.out_features)

    def __hash__(self) -> int:  # on every call of a layer: what makes two structures differ, and no more
        return hash((self.spec, self.in_features, self.out_features))

    def __str__(self) -> str:
        return f"{self.spec}, {self.in_features} -> {self.out_features}"


def build(pattern: Pattern, in_features: int, out_features: int, spec: str | None = None) -> Structure:
    """The structure of a pattern at a size: of equally balanced sizes the one of highest rank, then fewest MACs.

    These are compared with rank axes of size 1, so that a structure keeps its axes as its rank grows.

    Raises:
        DoesNotFit, ValueError: as `sizes.candidate_sizes`.
    """
    candidates = list(candidate_sizes(pattern, in_features, out_features))
    best = candidates[0]
    if len(candidates) > 1:
        thin = dict.fromkeys(pattern.rank_axes, 1)
        exact = counts.exact_factors(len(pattern.terms))
        axes = [tuple(dict.fromkeys(chain(t.inputs, *t.factors, t.outputs))) for t in pattern.terms]

        def worth(sizes: dict[str, int]) -> tuple[int, int]:
            sizes = sizes | thin
            parts = (
                counts.worth(term, tuple((axis, sizes[axis]) for axis in own), exact)
                for term, own in zip(pattern.terms, axes)
            )
            ranks, macs = zip(*parts)
            return min(sum(ranks), in_features, out_features), sum(macs)

        best = max(candidates, key=worth)  # the first of equals
    return _sized(pattern, best, in_features, out_features, spec or str(pattern))


def _sized(pattern: Pattern, sizes: dict[str, int], in_features: int, out_features: int, spec: str) -> Structure:
    check_text(spec)  # which may be longer than what was given
    names = iter(_factor_names(sum(len(term.factors) for term in pattern.terms)))
    exact = counts.exact_factors(len(pattern.terms))
    terms = tuple(_term(term, [next(names) for _ in term.factors], sizes, exact) for term in pattern.terms)
    macs = sum(factor.macs for term in terms for factor in term.factors)
    if macs > MAX_NUMBER:
        raise ValueError(f"the sizes multiply to 10^{len(str(macs)) - 1} MACs for one input: that is too many")
    theta = _axis_exponents(pattern, sizes, in_features, out_features)
    psi, nu, omega = map(float, counts.exponents(pattern.terms, theta))
    return Structure(spec, in_features, out_features, pattern, terms, tuple(sizes.items()), psi, nu, omega)


def _factor_names(count: int) -> list[str]:
    letters = string.ascii_uppercase
    return list(letters[:count]) if count <= len(letters) else [f"F{i}" for i in range(count)]


def _term(term: TermPattern, names: list[str], sizes: dict[str, int], exact: int) -> Term:
    order = counts.contraction_order(term, tuple(sizes.items()), exact)
    factors = []
    for position, index in enumerate(order):
        axes = term.factors[index]
        before, after = counts.state(term, order[:position]), counts.state(term, order[: position + 1])
        summed = tuple(axis for axis in before if axis in axes and axis not in after)
        introduced = tuple(axis for axis in axes if axis not in before)
        factors.append(
            Factor(
                name=names[index],
                axes=axes,
                shape=tuple(sizes[axis] for axis in axes),
                before=before,
                after=after,
                batch=tuple(axis for axis in before if axis in axes and axis in after),
                summed=summed,
                columns=tuple(axis for axis in before if axis not in axes),
                introduced=introduced,
                fan_in=math.prod(sizes[axis] for axis in summed),
                fan_out=math.prod(sizes[axis] for axis in introduced),
                macs=counts.step_macs(term, order[:position], index, sizes),
            )
        )
    return Term(term.inputs, tuple(factors), term.outputs)


def _axis_exponents(
    pattern: Pattern, sizes: dict[str, int], in_features: int, out_features: int
) -> dict[str, Fraction]:
    """How each axis grows with the features: as the pattern says, else an equal share of its group."""
    theta = {axis: size.exponent for axis, size in pattern.sizes}
    for group in groups(pattern, in_features, out_features):
        free = [axis for axis in group.axes if axis not in theta]
        left = 1 - sum((theta[axis] for axis in group.axes if axis in theta), Fraction(0))
        theta.update({axis: left / len(free) for axis in free})
        if not free and not any(theta[axis] for axis in group.axes) and group.features > 1:
            log = math.log(group.features)
            theta.update({axis: Fraction(math.log(sizes[axis]) / log) for axis in group.axes})
    return theta
