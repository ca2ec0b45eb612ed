"""The structured matrix with the closest outputs, for inputs x with the second moment C = E[x x^T].

The objective is tr((W - V) C (W - V)^T) over all V of the structure. If C has a block L L^T for all features that the
first factor sums at once, and zeros elsewhere, V L is the plain projection of W L. This is the solution for low rank,
else the start of L-BFGS, whose steps may solve for the last factor (variable projection, Golub and Pereyra).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.projection.als import contract, equalized
from einlinear.ops.projection.svd import count, is_optimal, merge, outer_axes, split, unfold, unmerge
from einlinear.ops.reference import dense_weight, einsum, term_weight
from einlinear.structures import Factor, Structure, Term, structure
from einlinear.structures.pattern import Axes, TermPattern

# noise as a fraction of the mean variance, about as large as rounding errors of float32 sums over many tokens
_NOISE = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# the number of steps, limited by multiply-accumulates
_MIN_STEPS, _MAX_STEPS, _WORK = 10, 100, 10**12
# The last factor is solved for if the matrix it multiplies has at most this many times the entries of W.
_CHEAP = 4


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
    return _descend(s, w, c, start, firsts, steps)


def error_of(s: Structure, w: Tensor, c: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """tr((V - W) C (V - W)^T), for the V of the factors."""
    difference = dense_weight(s, factors) - w
    return ((difference @ c) * difference).sum()


@dataclass(frozen=True)
class _FirstFactor:
    """The first factor of a term, and the whitening of the n input features that it sums."""

    factor: Factor
    # L, (batch, n, n), lower triangular, one for each value of the factor's batch axes
    roots: Tensor

    @classmethod
    def of(cls, s: Structure, term: Term, second_moment: Tensor) -> _FirstFactor:
        factor, sizes = term.factors[0], dict(s.sizes)
        padding, _ = s.padding(term)
        c = F.pad(second_moment, (0, padding, 0, padding))
        # padding is always zero, so any variance will do
        c.diagonal()[s.in_features :] = second_moment.diagonal().mean()
        other = tuple(f"{axis}'" if axis in factor.contracted else axis for axis in term.inputs)
        shape = [sizes[axis] for axis in term.inputs]
        result = factor.batch + factor.contracted + tuple(f"{axis}'" for axis in factor.contracted)
        n = factor.fan_in
        blocks = einsum([(*term.inputs, *other)], result, c.reshape(shape + shape)).reshape(-1, n, n)
        roots, definite = _cholesky(blocks / count(factor.free, sizes), _NOISE)
        if not definite:
            raise ValueError("the second moment is not positive semidefinite, as that of any inputs is")
        return cls(factor, roots)

    def whiten(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Multiply a tensor that has the batch and contracted axes, among others, with L."""
        return self._along(tensor, axes, torch.matmul)

    def colour(self, factor: Tensor) -> Tensor:
        """Multiply the factor with the inverse of L."""
        solve = partial(torch.linalg.solve_triangular, upper=False, left=False)
        return self._along(factor, self.factor.axes, lambda flat, roots: solve(roots, flat))

    def _along(self, tensor: Tensor, axes: Axes, operands: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        batch, contracted = self.factor.batch, self.factor.contracted
        groups = batch, tuple(axis for axis in axes if axis not in batch + contracted), contracted
        flat = operands(merge(tensor, axes, groups), self.roots.to(tensor.dtype))
        return unmerge(flat, groups, axes, dict(zip(axes, tensor.shape, strict=True)))


def _cholesky(matrices: Tensor, ridges: Sequence[float]) -> tuple[Tensor, bool]:
    """The roots with the first ridge, a fraction of the mean diagonal, that makes all matrices positive definite."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)
    identity = torch.eye(matrices.shape[1]).to(matrices)
    for ridge in ridges:
        roots, failed = torch.linalg.cholesky_ex(matrices + ridge * mean * identity)
        if not failed.any():
            return roots, True
    return roots, False


def _split(s: Structure, w: Tensor, readers: Sequence[_FirstFactor]) -> list[Tensor]:
    """Successive SVDs of the whitened matrix, one term after the other."""
    factors: list[Tensor] = []
    residual = w
    for reader, term in zip(readers, s.terms, strict=True):
        first, *others = split(s, term, reader.whiten(unfold(residual, s, term), outer_axes(term)))
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
    simple = structure(str(without), s.in_features, s.out_features, sizes=dict(s.sizes))
    closest = zip(simple.factors, closest_outputs(simple, w, second_moment), strict=True)
    by_axes = {factor.axes: tensor for factor, tensor in closest}
    return [[by_axes[f.axes] if f in (first, last) else w.new_ones(f.shape) for f in term.factors]]


def _descend(
    s: Structure, w: Tensor, c: Tensor, start: Sequence[Tensor], firsts: Mapping[int, _FirstFactor], steps: int | None
) -> list[Tensor]:
    """Reduce the error of outputs from a start by L-BFGS, and return the factors."""
    scale = float(((w @ c) * w).sum())
    if scale == 0:
        return list(start)
    max_steps = min(_MAX_STEPS, max(_MIN_STEPS, _WORK // (w.numel() * len(c))))
    steps = max_steps if steps is None else min(steps, max_steps)
    last = _LastFactor.of(s, w, c)
    whitened = [firsts[i].whiten(f, firsts[i].factor.axes) if i in firsts else f for i, f in enumerate(start)]
    variables = equalized(s, whitened)
    searched = [v.contiguous().clone().requires_grad_() for v in (variables[:-1] if last else variables)]

    def factors() -> list[Tensor]:
        return [firsts[i].colour(v) if i in firsts else v for i, v in enumerate(searched)]

    def closure() -> Tensor:
        error = (last.error(factors()) if last else error_of(s, w, c, factors())) / scale
        for variable, gradient in zip(searched, torch.autograd.grad(error, searched), strict=True):
            variable.grad = gradient.contiguous()
        return error.detach()

    search = torch.optim.LBFGS(searched, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")
    previous = math.inf
    with torch.enable_grad():
        for done in range(0, steps, 10):
            search.param_groups[0]["max_iter"] = min(10, steps - done)
            # the error before these steps
            error = float(search.step(closure))
            if previous - error < 1e-3 * error:
                break
            previous = error
    best = [factor.detach() for factor in factors()]
    return [*best, last.best(best)] if last else best


@dataclass(frozen=True)
class _LastFactor:
    """The last factor of a structure of one term, and the least squares problem that it solves.

    The other factors give z of shape (batch, contracted, free, in_features); b, s, d, i in einsums, and e for new.
    W and W C are (batch, new, free, in_features). C has the input axes, and the input features once more.
    """

    s: Structure
    term: Term
    c: Tensor
    w: Tensor
    wc: Tensor

    @classmethod
    def of(cls, s: Structure, w: Tensor, c: Tensor) -> _LastFactor | None:
        """Return None if the last factor has to be searched for as well."""
        term, sizes = s.terms[0], dict(s.sizes)
        last = term.factors[-1]
        # with free axes, padding rows would count, since they share entries of the factor with outputs
        shares = last.free and s.padding(term)[1] > 0
        if len(s.terms) > 1 or len(term.factors) < 2 or set(term.inputs) & set(term.outputs) or shares:
            return None
        if count(last.source, sizes) > _CHEAP * s.out_features:
            return None

        def by_row(matrix: Tensor) -> Tensor:
            groups = (last.batch, last.new, last.free, term.inputs)
            return merge(unfold(matrix, s, term), outer_axes(term), groups)[..., : s.in_features]

        padding = count(term.inputs, sizes) - s.in_features
        by_axes = F.pad(c, (0, 0, 0, padding)).reshape([*(sizes[axis] for axis in term.inputs), s.in_features])
        return cls(s, term, by_axes, by_row(w), by_row(w @ c))

    @torch.no_grad()
    def best(self, others: Sequence[Tensor]) -> Tensor:
        """The last factor of least error, given the others."""
        last, z = self.term.factors[-1], self._multiplied(others)
        groups = (last.batch, last.new, last.contracted)
        return unmerge(self._solved(z, self._multiplied_by_moment(others)), groups, last.axes, dict(self.s.sizes))

    def error(self, others: Sequence[Tensor]) -> Tensor:
        """The error with the best last factor. Its gradient is that for a fixed last factor (envelope theorem)."""
        z = self._multiplied(others)
        with torch.no_grad():
            zc = self._multiplied_by_moment(others)
            solved = self._solved(z, zc)
            residual = self.wc - torch.einsum("bes,bsdi->bedi", solved, zc)
            error = ((self.w - torch.einsum("bes,bsdi->bedi", solved, z)) * residual).sum()
            slope = -2 * torch.einsum("bes,bedi->bsdi", solved, residual)
        return error + ((z - z.detach()) * slope).sum()

    def _solved(self, z: Tensor, zc: Tensor) -> Tensor:
        """The last factor as matrices, (batch, new, contracted)."""
        gram = torch.einsum("bsdi,btdi->bst", zc, z).double()
        right = torch.einsum("bsdi,bedi->bse", z, self.wc).double()
        roots, _ = _cholesky(gram, ridges=(1e-7, 1e-5, 1e-3))
        return torch.cholesky_solve(right, roots).to(z.dtype).transpose(1, 2)

    def _multiplied(self, others: Sequence[Tensor]) -> Tensor:
        """The product z of the other factors, (batch, contracted, free, in_features)."""
        last, sizes = self.term.factors[-1], dict(self.s.sizes)
        groups = (last.batch, last.contracted, last.free)
        before = Term(self.term.inputs, self.term.factors[:-1], sum(groups, ()))
        z = term_weight(replace(self.s, out_features=count(before.outputs, sizes)), before, others)
        return z.reshape([count(axes, sizes) for axes in groups] + [self.s.in_features])

    def _multiplied_by_moment(self, others: Sequence[Tensor]) -> Tensor:
        """The product z C: the sparse factors times C are cheaper than their dense product times C."""
        first, *between = ((factor.axes, tensor) for factor, tensor in zip(self.term.factors, others, strict=False))
        last, sizes = self.term.factors[-1], dict(self.s.sizes)
        groups = (last.batch, last.contracted, last.free)
        zc = contract([first, ((*self.term.inputs, "feature"), self.c), *between], (*sum(groups, ()), "feature"))
        return zc.reshape([count(axes, sizes) for axes in groups] + [self.s.in_features])


def best_last_factor(s: Structure, w: Tensor, second_moment: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """Return the last factor with the closest outputs, given the others; None if it has no cheap closed form."""
    last = _LastFactor.of(s, w, second_moment)
    return None if last is None else last.best(others)
