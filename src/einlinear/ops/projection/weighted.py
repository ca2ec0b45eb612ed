"""The structured matrix with the closest outputs, for inputs x with the second moment C = E[x x^T].

The objective is E|(W - V) x|^2 = tr((W - V) C (W - V)^T) over all V of the structure. If C is block-diagonal, with a
block C_g = L_g L_g^T for all features that the first factor sums at once, this is the plain projection in other
variables: V L closest to W L. Low rank has a single block, so that is the solution. For other structures it is the
start. From there L-BFGS reduces the exact error over all factors at once (descent.py), in the same variables: they make
the problem well conditioned for any C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.projection.als import balanced
from einlinear.ops.projection.descent import descend, error_of
from einlinear.ops.projection.svd import is_optimal, split
from einlinear.ops.projection.unfolding import count, outer_axes, permute, unfold
from einlinear.ops.reference import einsum, term_weight
from einlinear.structures import Factor, Structure, Term, structure
from einlinear.structures.pattern import Axes, TermPattern

# Noise as a fraction of the mean variance: rounding errors of float32 sums over many tokens are about as large.
_NOISE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def closest_outputs(s: Structure, w: Tensor, second_moment: Tensor, steps: int | None = None) -> list[Tensor]:
    """Return the factors with the outputs closest to those of W, for a positive definite second moment."""
    readers = [_FirstFactor.of(s, term, second_moment.double()) for term in s.terms]
    c = second_moment.to(w.dtype)
    starts = [_split(s, w, readers), *_two_factor_start(s, w, second_moment)]
    start = min(starts, key=lambda factors: error_of(s, w, c, factors))
    if is_optimal(s) and s.factors[0].fan_in == s.in_features:
        # two factors, the first of which reads all features at once
        return start
    firsts = {numbers[0]: reader for reader, (_, numbers) in zip(readers, s.by_term(range(len(start))), strict=True)}

    def coloured(variables: Sequence[Tensor]) -> list[Tensor]:
        return [firsts[i].colour(v) if i in firsts else v for i, v in enumerate(variables)]

    whitened = [firsts[i].whiten(f, firsts[i].factor.axes) if i in firsts else f for i, f in enumerate(start)]
    return descend(s, w, c, balanced(s, whitened), coloured, steps)


@dataclass(frozen=True)
class _FirstFactor:
    """The first factor of a term, and the whitening of the n input features that it sums.

    Attributes:
        factor: the factor.
        roots: L, (batch, n, n), lower triangular, one for each value of the factor's batch axes.
    """

    factor: Factor
    roots: Tensor

    @classmethod
    def of(cls, s: Structure, term: Term, second_moment: Tensor) -> _FirstFactor:
        factor, sizes = term.factors[0], dict(s.sizes)
        padding = count(term.inputs, sizes) - s.in_features
        c = F.pad(second_moment, (0, padding, 0, padding))
        # padding is always zero, so any variance will do
        c.diagonal()[s.in_features :] = second_moment.diagonal().mean()
        other = tuple(f"{axis}'" if axis in factor.contracted else axis for axis in term.inputs)
        shape = [sizes[axis] for axis in term.inputs]
        result = factor.batch + factor.contracted + tuple(f"{axis}'" for axis in factor.contracted)
        n = count(factor.contracted, sizes)
        blocks = einsum([(*term.inputs, *other)], result, c.reshape(shape + shape)).reshape(-1, n, n)
        return cls(factor, _root(blocks / count(factor.free, sizes)))

    def whiten(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Multiply a tensor that has the batch and contracted axes, among others, with L."""
        return self._along(tensor, axes, torch.matmul)

    def colour(self, factor: Tensor) -> Tensor:
        """Multiply the factor with the inverse of L."""
        solve = partial(torch.linalg.solve_triangular, upper=False, left=False)
        return self._along(factor, self.factor.axes, lambda flat, roots: solve(roots, flat))

    def _along(self, tensor: Tensor, axes: Axes, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        batch, contracted = self.factor.batch, self.factor.contracted
        order = batch + tuple(axis for axis in axes if axis not in batch + contracted) + contracted
        ordered = permute(tensor, axes, order)
        flat = ordered.reshape(len(self.roots), -1, self.roots.shape[1])
        return permute(product(flat, self.roots.to(tensor.dtype)).reshape(ordered.shape), order, axes)


def _root(second_moments: Tensor) -> Tensor:
    """The Cholesky factors of matrices (batch, n, n), definite up to rounding, with as little noise as needed."""
    variance = second_moments.diagonal(dim1=1, dim2=2).mean()
    identity = torch.eye(second_moments.shape[1]).to(second_moments)
    for noise in (0.0, *_NOISE):
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(second_moments + noise * variance * identity)
        if not failed.any():
            return root
    raise ValueError("the second moment is not positive semidefinite, as that of any inputs is")


def _split(s: Structure, w: Tensor, readers: Sequence[_FirstFactor]) -> list[Tensor]:
    """Successive SVDs of the whitened matrix, one term after the other."""
    factors: list[Tensor] = []
    residual = w
    for reader, term in zip(readers, s.terms, strict=True):
        target = reader.whiten(unfold(residual, s, term), outer_axes(term))
        first, *others = split(s, term, target)
        term_factors = [reader.colour(first), *others]
        residual = residual - term_weight(s, term, term_factors)
        factors += term_factors
    return factors


def _two_factor_start(s: Structure, w: Tensor, second_moment: Tensor) -> list[list[Tensor]]:
    """Another start if all factors between the first and the last only scale, as in BLAST: ones for these."""
    if len(s.terms) > 1 or len(s.factors) < 3:
        return []
    (term,) = s.terms
    first, *between, last = term.factors
    ends, outer = {*first.axes, *last.axes}, {*outer_axes(term)}
    if not {*first.axes} ^ {*last.axes} <= outer or any(not {*factor.axes} <= ends for factor in between):
        return []
    without = TermPattern(term.inputs, (first.axes, last.axes), term.outputs)
    simple = structure(str(without), s.in_features, s.out_features, sizes={a: n for a, n in s.sizes})
    ends_by_axes = {
        f.axes: factor for f, factor in zip(simple.factors, closest_outputs(simple, w, second_moment), strict=True)
    }
    return [[ends_by_axes[f.axes] if f in (first, last) else w.new_ones(f.shape) for f in term.factors]]
