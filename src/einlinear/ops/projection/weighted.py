"""The structured matrix whose outputs are closest, for inputs x of which the second moment C = E[x x^T] is known.

Minimised is E|(W - V) x|^2 = tr((W - V) C (W - V)^T) over all V of the structure. Were C block-diagonal, with a block
C_g = L_g L_g^T for all that the first factor sums at once, this would be the plain projection in other variables: V L
closest to W L. So it is for low rank, which has a single block; for the others it is the start. From there L-BFGS
reduces the true error over all factors at once, in those variables (descent.py): in them the problem is well
conditioned, however C is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.projection.als import of_equal_norm
from einlinear.ops.projection.descent import descend, error_of
from einlinear.ops.projection.svd import is_optimal, split
from einlinear.ops.projection.unfold import count, outer_axes, permute, unfold
from einlinear.ops.reference import einsum, term_weight
from einlinear.structures import Factor, Structure, Term, structure
from einlinear.structures.pattern import Axes, TermPattern

_NOISE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the mean variance; in float32, sums over many tokens are off by as much


def closest_outputs(s: Structure, w: Tensor, moment: Tensor, steps: int | None = None) -> list[Tensor]:
    """Factors whose outputs are closest to those of W.

    Args:
        s: the structure.
        w: (out_features, in_features), float32 or float64.
        moment: (in_features, in_features), positive definite, of W's device.
        steps: at most so many of L-BFGS; None: as many as pay.
    """
    readers = [_Reader.of(s, term, moment.double()) for term in s.terms]
    c = moment.to(w.dtype)
    starts = [_split(s, w, readers), *_simpler(s, w, moment)]
    start = min(starts, key=lambda factors: error_of(s, w, c, factors))
    if _is_exact(s):
        return start
    firsts = {number: reader for reader, (_, (number, *_)) in zip(readers, s.by_term(range(len(start))), strict=True)}

    def coloured(given: Sequence[Tensor]) -> list[Tensor]:
        return [firsts[i].colour(v, firsts[i].factor.axes) if i in firsts else v for i, v in enumerate(given)]

    by_term = zip(readers, s.by_term(start), strict=True)
    variables = [
        variable
        for reader, (_, (first, *others)) in by_term
        for variable in of_equal_norm([reader.whiten(first, reader.factor.axes), *others])
    ]
    return descend(s, w, c, variables, coloured, steps)


@dataclass(frozen=True)
class _Reader:
    """The factor of a term that reads the input, and what whitens the features that it sums.

    Attributes:
        factor: the first of its term.
        sizes: of the axes.
        roots: L, (batch, n, n), lower triangular, for the axes that the factor shares with the input and leaves in it;
            n features are summed.
    """

    factor: Factor
    sizes: dict[str, int]
    roots: Tensor

    @classmethod
    def of(cls, s: Structure, term: Term, moment: Tensor) -> _Reader:
        factor, sizes = term.factors[0], dict(s.sizes)
        spare = count(term.inputs, sizes) - s.in_features
        c = F.pad(moment, (0, spare, 0, spare))
        c.diagonal()[s.in_features :] = moment.diagonal().mean()  # of what is always zero: any variance will do
        other = tuple(f"{axis}'" if axis in factor.contracted else axis for axis in term.inputs)
        shape = [sizes[axis] for axis in term.inputs]
        kept = factor.batch + factor.contracted + tuple(f"{axis}'" for axis in factor.contracted)
        n = count(factor.contracted, sizes)
        blocks = einsum([(*term.inputs, *other)], kept, c.reshape(shape + shape)).reshape(-1, n, n)
        return cls(factor, sizes, _root(blocks / count(factor.free, sizes)))

    def whiten(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Times L: a tensor that has, among others, the axes that the factor shares with the input."""
        return self._along(tensor, axes, torch.matmul)

    def colour(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Times the inverse of L."""
        return self._along(
            tensor, axes, lambda flat, roots: torch.linalg.solve_triangular(roots, flat, upper=False, left=False)
        )

    def _along(self, tensor: Tensor, axes: Axes, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        batch, summed = self.factor.batch, self.factor.contracted
        order = batch + tuple(axis for axis in axes if axis not in batch + summed) + summed
        ordered = permute(tensor, axes, order)
        flat = ordered.reshape(len(self.roots), -1, self.roots.shape[1])
        return permute(product(flat, self.roots.to(tensor.dtype)).reshape(ordered.shape), order, axes)


def _root(moments: Tensor) -> Tensor:
    """L of L L^T, of moments (batch, n, n) that are definite up to rounding: as little noise as it takes is added."""
    variance = moments.diagonal(dim1=1, dim2=2).mean()
    one = torch.eye(moments.shape[1]).to(moments)
    for noise in (0.0, *_NOISE):
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(moments + noise * variance * one)
        if not failed.any():
            return root
    raise ValueError("the moment is not that of any inputs: it has negative variances")


def _split(s: Structure, w: Tensor, readers: Sequence[_Reader]) -> list[Tensor]:
    """Successive SVDs of the whitened matrix, one term after the other."""
    factors: list[Tensor] = []
    left = w
    for reader, term in zip(readers, s.terms, strict=True):
        target = reader.whiten(unfold(left, s, term), outer_axes(term))
        first, *others = split(s, term, target)
        own = [reader.colour(first, term.factors[0].axes), *others]
        left = left - term_weight(s, term, own)
        factors += own
    return factors


def _simpler(s: Structure, w: Tensor, moment: Tensor) -> list[list[Tensor]]:
    """Another start, if the structure has factors that only scale, as BLAST: the best there is with ones for them."""
    if len(s.terms) > 1 or len(s.factors) < 3:
        return []
    (term,) = s.terms
    first, *between, last = term.factors
    ends, outer = {*first.axes, *last.axes}, {*outer_axes(term)}
    if not {*first.axes} ^ {*last.axes} <= outer or any(not {*factor.axes} <= ends for factor in between):
        return []
    without = TermPattern(term.inputs, (first.axes, last.axes), term.outputs)
    simple = structure(str(without), s.in_features, s.out_features, sizes={a: n for a, n in s.sizes})
    found = {f.axes: factor for f, factor in zip(simple.factors, closest_outputs(simple, w, moment), strict=True)}
    return [[found[f.axes] if f in (first, last) else w.new_ones(f.shape) for f in term.factors]]


def _is_exact(s: Structure) -> bool:
    """Whether the start is the best there is: two factors, the first of which reads all features at once."""
    return is_optimal(s) and s.factors[0].fan_in == s.in_features
