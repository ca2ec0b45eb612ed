"""`Structure`: a matrix at one size, with parameters, MACs and muP scales. Of models: the lab's `models/macs.py`."""

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from einlinear.structures.contraction import contract, generic_rank, intermediates, scaling_exponents, sharding_axis
from einlinear.structures.pattern import Axes, Pattern, TermPattern

T = TypeVar("T")


@dataclass(frozen=True)
class Factor:
    """One factor of a structured matrix, and the contraction step that applies it to the input or an intermediate.

    Attributes:
        name: A, B, C, ... in the written order; also the name of the layer's parameter.
        axes, shape: the axes in the written order, and their sizes: the shape of the parameter.
        source, result: the axes of the intermediate that the step reads, and of the one that it leaves.
        batch, contracted: the axes of factor and source that the result has, and that are summed.
        free, new: the axes of the result that the factor lacks, and that the source lacks.
        fan_in, fan_out: the products of the sizes of `contracted` and of `new`.
        macs: multiply-accumulates of the step for one input vector.
    """

    name: str
    axes: Axes
    shape: tuple[int, ...]
    source: Axes
    result: Axes
    batch: Axes
    contracted: Axes
    free: Axes
    new: Axes
    fan_in: int
    fan_out: int
    macs: int

    @property
    def params(self) -> int:
        """The number of entries of the factor."""
        return math.prod(self.shape)

    @property
    def result_size(self) -> int:
        """The size of the intermediate that the step leaves, for one input vector."""
        return self.macs // self.fan_in


@dataclass(frozen=True)
class Term:
    """One summand of a structured matrix: axes of the input, factors in order of contraction, axes of the output."""

    inputs: Axes
    factors: tuple[Factor, ...]
    outputs: Axes

    @property
    def intermediate_size(self) -> int:
        """The size of all intermediates between two factors together, for one input vector."""
        return sum(factor.result_size for factor in self.factors[:-1])


@dataclass(frozen=True)
class Structure:
    """A structured matrix of shape (out_features, in_features). Made by `einlinear.structure`; immutable, hashable.

    Attributes:
        spec: canonical text: ``structure(spec, in_features, out_features)`` returns an equal structure.
        in_features, out_features: the shape of the matrix.
        pattern: the parsed pattern that the spec stands for; `str` returns its text.
        sizes: (axis, size) pairs of all axes.
    """

    spec: str
    in_features: int
    out_features: int
    pattern: Pattern
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The summands of the matrix."""
        terms = self.pattern.terms
        count = sum(len(term.factors) for term in terms)
        names = iter(string.ascii_uppercase if count <= 26 else [f"F{i}" for i in range(count)])
        return tuple(_term(term, [next(names) for _ in term.factors], dict(self.sizes), len(terms)) for term in terms)

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of all terms, in order of contraction."""
        return tuple(factor for term in self.terms for factor in term.factors)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all factors."""
        return tuple(factor.shape for factor in self.factors)

    def by_term(self, entries: Sequence[T]) -> list[tuple[Term, Sequence[T]]]:
        """Split a sequence that has one entry per factor, in the order of `factors`, by term.

        >>> import einlinear as el
        >>> [part for _, part in el.structure("i, r i, o r -> o + i, o i -> o where r=2", 4, 4).by_term("XYZ")]
        ['XY', 'Z']
        """
        if len(entries) != len(self.factors):
            raise ValueError(f"{self} has {len(self.factors)} factors, not {len(entries)}")
        ends = itertools.accumulate(len(term.factors) for term in self.terms)
        return [(term, entries[end - len(term.factors) : end]) for term, end in zip(self.terms, ends, strict=True)]

    def padding(self, term: Term) -> tuple[int, int]:
        """Return how many more inputs and outputs a term has than the matrix: zeros, and outputs that are dropped.

        >>> import einlinear as el
        >>> s = el.structure("btt", 61, 59)
        >>> [s.padding(term) for term in s.terms]
        [(2, 1)]
        """
        sizes = dict(self.sizes)
        # lists, since torch.compile cannot trace math.prod of a generator
        inputs, outputs = math.prod([sizes[a] for a in term.inputs]), math.prod([sizes[a] for a in term.outputs])
        return inputs - self.in_features, outputs - self.out_features

    @cached_property
    def is_padded(self) -> bool:
        """Whether a term has more inputs or outputs than the matrix."""
        return any(self.padding(term) != (0, 0) for term in self.terms)

    def sharding(self, side: str) -> str | None:
        """Return the axis that splits the features of a side over devices, with no communication between the factors.

        Every factor that has axes of this side has the axis too, so each device holds a slice of it. Factors without
        axes of this side are replicated. Axes of size 1 do not count.

        Args:
            side: "out", or "in", for which the outputs of the devices are summed.

        Returns:
            An axis, or None where no axis is in all these factors, or the terms would split different features. The
            features of a device are consecutive if the axis is the first of the side, as `btt`'s is; those of
            `monarch`'s output are not. `einlinear.structures.sharding` splits consecutive features.

        Raises:
            ValueError: a side other than "in" and "out".

        Example:
            >>> import einlinear as el
            >>> s = el.structure("(g a), g r f a, f e g r -> (f e) where r=1", 64, 64)
            >>> s.sharding("out"), s.sharding("in")
            ('f', 'g')
        """
        if side not in ("in", "out"):
            raise ValueError(f"side must be 'in' or 'out', not {side!r}")
        sizes = dict(self.sizes)

        def long(axes: Axes) -> Axes:
            return tuple(axis for axis in axes if sizes[axis] > 1)

        terms = [
            TermPattern(long(term.inputs), tuple(map(long, term.factors)), long(term.outputs))
            for term in self.pattern.terms
        ]
        return sharding_axis(terms, side)

    @cached_property
    def params(self) -> int:
        """The number of entries of all factors, as stored. The bias is not counted."""
        return sum(factor.params for factor in self.factors)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one input vector, as computed, padding included."""
        return sum(factor.macs for factor in self.factors)

    @cached_property
    def rank(self) -> int:
        """The rank for almost all values of the factors. With padding and many axes it is a close upper bound."""
        return generic_rank(self.pattern.terms, dict(self.sizes), self.in_features, self.out_features)

    @property
    def psi(self) -> float:
        """The exponent of the rank: rank = n^psi for n features as balanced axes grow (arXiv 2410.02117, section 3)."""
        return self._exponents[0]

    @property
    def nu(self) -> float:
        """The exponent of the MACs: MACs = n^(1 + nu) for n features. See `psi`."""
        return self._exponents[1]

    @property
    def omega(self) -> float:
        """The exponent of parameter sharing: parameters / MACs = n^-omega for n features. See `psi`."""
        return self._exponents[2]

    @cached_property
    def _exponents(self) -> tuple[float, ...]:
        return scaling_exponents(self.pattern, dict(self.sizes), self.in_features, self.out_features)

    def __hash__(self) -> int:
        # layers hash their structure in every call, and these three tell structures apart
        return hash((self.spec, self.in_features, self.out_features))

    def __str__(self) -> str:
        return f"{self.spec}, {self.in_features} -> {self.out_features}"


def _term(term: TermPattern, names: Sequence[str], sizes: Mapping[str, int], terms: int) -> Term:
    def size(axes: Axes) -> int:
        return math.prod(sizes[axis] for axis in axes)

    order, factors = contract(term, sizes, terms).order, []
    for index, (source, result) in zip(order, itertools.pairwise(intermediates(term, order)), strict=True):
        axes = term.factors[index]
        shape = tuple(sizes[axis] for axis in axes)
        batch = tuple(axis for axis in source if axis in axes and axis in result)
        contracted = tuple(axis for axis in source if axis in axes and axis not in result)
        free = tuple(axis for axis in source if axis not in axes)
        new = tuple(axis for axis in axes if axis not in source)
        counts = size(contracted), size(new), size(contracted) * size(result)
        factors.append(Factor(names[index], axes, shape, source, result, batch, contracted, free, new, *counts))
    return Term(term.inputs, tuple(factors), term.outputs)
