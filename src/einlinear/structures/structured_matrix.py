"""`Structure`: the description of a structured matrix at one size, in plain numbers and names, without tensors."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from einlinear.structures.contraction import contract, intermediates, scaling_exponents
from einlinear.structures.limits import MAX_NUMBER, check_text
from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.rank import generic_rank
from einlinear.structures.sizes import candidate_sizes

T = TypeVar("T")


@dataclass(frozen=True)
class Factor:
    """One factor of a structured matrix, and the contraction step that applies it.

    The step reads an intermediate (the input, for the first factor) and leaves another one (the output, for the last).

    Attributes:
        name: A, B, C, ... in the order the pattern writes them; also the name of the layer's parameter.
        axes: the axes as the pattern writes them.
        shape: the sizes of these axes, which is the shape of the parameter.
        source: the axes of the intermediate that the step reads.
        result: the axes of the intermediate that the step leaves.
        batch: the axes that factor, source and result have.
        contracted: the axes that factor and source have: they are summed.
        free: the axes that source and result have: the same matrices are applied for all of their values.
        new: the axes that factor and result have.
        fan_in: the product of the sizes of `contracted`.
        fan_out: the product of the sizes of `new`.
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
    """One summand of a structured matrix.

    Attributes:
        inputs: the axes of the input features.
        factors: in order of contraction.
        outputs: the axes of the output features.
    """

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
        terms, sizes = self.pattern.terms, dict(self.sizes)
        count = sum(len(term.factors) for term in terms)
        names = iter(string.ascii_uppercase if count <= 26 else [f"F{i}" for i in range(count)])
        return tuple(_term(term, [next(names) for _ in term.factors], sizes, len(terms)) for term in terms)

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of all terms, in order of contraction."""
        return tuple(factor for term in self.terms for factor in term.factors)

    def by_term(self, entries: Sequence[T]) -> list[tuple[Term, Sequence[T]]]:
        """Split a sequence that has one entry per factor, in the order of `factors`, by term.

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
        """The number of entries of all factors, as stored. The bias is not counted."""
        return sum(factor.params for factor in self.factors)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one input vector, as computed, padding included."""
        sizes, terms = dict(self.sizes), self.pattern.terms
        return sum(contract(term, sizes, len(terms)).macs for term in terms)

    @cached_property
    def rank(self) -> int:
        """The rank of the matrix for almost all values of the factors.

        With padding and many axes it is an upper bound, off by less than the padding.
        """
        return generic_rank(self.pattern.terms, dict(self.sizes), self.in_features, self.out_features)

    @property
    def psi(self) -> float:
        """The exponent of the rank: rank = n^psi for n features.

        psi, nu and omega are defined as in Potapczynski et al., arXiv 2410.02117. They are asymptotic, for in_features
        = out_features = n: named sizes (``rank=4``, ``blocks=4``) stay fixed and balanced axes grow. If all axes of the
        input or of the output have a fixed size, these axes count with the exponents they have at this size. The
        factors are taken in written order, as in the paper. A theta that is cheaper in the other order (the paper
        admits none) can have a smaller rank than psi suggests; `rank` is exact.
        """
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
    def _exponents(self) -> tuple[float, float, float]:
        return scaling_exponents(self.pattern, dict(self.sizes), self.in_features, self.out_features)

    def __hash__(self) -> int:
        # Layers hash their structure in every call, so only what tells two structures apart is hashed.
        return hash((self.spec, self.in_features, self.out_features))

    def __str__(self) -> str:
        return f"{self.spec}, {self.in_features} -> {self.out_features}"


def build(pattern: Pattern, in_features: int, out_features: int, spec: str | None = None) -> Structure:
    """Build the structure of a pattern at one size.

    If several assignments of sizes are equally balanced, the one of highest rank is taken, then the one of fewest MACs.
    They are compared with rank axes of size 1, so that a structure keeps its axes as its rank grows.

    Raises:
        DoesNotFit, ValueError: as `sizes.candidate_sizes`.
    """
    best, *others = candidate_sizes(pattern, in_features, out_features)
    if others:
        # of equals, the first
        best = max([best, *others], key=lambda sizes: _preference(pattern, sizes, min(in_features, out_features)))
    spec = spec or str(pattern)
    # the canonical text may be longer than the text that was read
    check_text(spec)
    structure = Structure(spec, in_features, out_features, pattern, tuple(best.items()))
    if structure.macs > MAX_NUMBER:
        raise ValueError(
            f"the sizes multiply to 10^{len(str(structure.macs)) - 1} MACs for one input: that is too many"
        )
    return structure


def _preference(pattern: Pattern, sizes: Mapping[str, int], full_rank: int) -> tuple[int, int]:
    """Rank without padding, then MACs (negated), with rank axes of size 1."""
    sizes = {**sizes, **dict.fromkeys(pattern.rank_axes, 1)}
    contractions = [contract(term, sizes, len(pattern.terms)) for term in pattern.terms]
    rank = sum(contraction.bottleneck for contraction in contractions)
    return min(rank, full_rank), -sum(contraction.macs for contraction in contractions)


def _term(term: TermPattern, names: Sequence[str], sizes: Mapping[str, int], terms: int) -> Term:
    """A term with its factors in order of contraction."""

    def size(axes: Axes) -> int:
        return math.prod(sizes[axis] for axis in axes)

    order, factors = contract(term, sizes, terms).order, []
    for index, (source, result) in zip(order, pairwise(intermediates(term, order)), strict=True):
        axes = term.factors[index]
        shape = tuple(sizes[axis] for axis in axes)
        batch = tuple(axis for axis in source if axis in axes and axis in result)
        contracted = tuple(axis for axis in source if axis in axes and axis not in result)
        free = tuple(axis for axis in source if axis not in axes)
        new = tuple(axis for axis in axes if axis not in source)
        counts = size(contracted), size(new), size(contracted) * size(result)
        factors.append(Factor(names[index], axes, shape, source, result, batch, contracted, free, new, *counts))
    return Term(term.inputs, tuple(factors), term.outputs)
