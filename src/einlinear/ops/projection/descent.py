"""L-BFGS on the error of a structured matrix's outputs, over all of its factors at once.

If it is cheap, the last factor is no variable: given the others, the best last factor solves a linear least squares
problem (variable projection, Golub and Pereyra). That halves the number of steps, most of all for BLAST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.ops.projection.unfolding import count, merge, outer_axes, unfold, unmerge
from einlinear.ops.reference import dense_weight, einsum
from einlinear.structures import Structure, Term

MIN_STEPS, MAX_STEPS = 10, 100
# The search ends if _BETWEEN steps reduce the squared error by less than this fraction.
TOLERANCE = 1e-3
_BETWEEN = 10
# multiply-accumulates that limit the number of steps, within MIN_STEPS and MAX_STEPS
_WORK = 10**12
# The last factor is solved for if the matrix it multiplies has at most this many times the entries of W.
_CHEAP = 4
# regularisation as a fraction of the mean diagonal: the first with which the equations can be solved
_RIDGES = (1e-7, 1e-5, 1e-3)

Colours = Callable[[Sequence[Tensor]], list[Tensor]]


def error_of(s: Structure, w: Tensor, c: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """tr((V - W) C (V - W)^T), for the V of the factors."""
    difference = dense_weight(s, factors) - w
    return ((difference @ c) * difference).sum()


def descend(
    s: Structure, w: Tensor, c: Tensor, variables: Sequence[Tensor], coloured: Colours, steps: int | None
) -> list[Tensor]:
    """Reduce the error of outputs for the input second moment C, and return the factors.

    `variables` is the start. `coloured` is the function from variables to factors; it leaves the last one as it is.
    """
    scale = float(((w @ c) * w).sum())
    if scale == 0:
        return coloured(variables)
    max_steps = min(MAX_STEPS, max(MIN_STEPS, _WORK // (w.numel() * len(c))))
    steps = max_steps if steps is None else min(steps, max_steps)
    last = _LastFactor.of(s, w, c)
    searched = [v.contiguous().clone().requires_grad_() for v in (variables[:-1] if last else variables)]

    def factors() -> list[Tensor]:
        return coloured([*searched, variables[-1]])[:-1] if last else coloured(searched)

    def closure() -> Tensor:
        error = (last.error(factors()) if last else error_of(s, w, c, factors())) / scale
        for variable, gradient in zip(searched, torch.autograd.grad(error, searched), strict=True):
            variable.grad = gradient.contiguous()
        return error.detach()

    search = torch.optim.LBFGS(
        searched, max_iter=_BETWEEN, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    previous = math.inf
    with torch.enable_grad():
        for done in range(0, steps, _BETWEEN):
            search.param_groups[0]["max_iter"] = min(_BETWEEN, steps - done)
            # the error before these steps
            error = float(search.step(closure))
            if previous - error < TOLERANCE * error:
                break
            previous = error
    best = [factor.detach() for factor in factors()]
    return [*best, last.best(best)] if last else best


@dataclass(frozen=True)
class _LastFactor:
    """The last factor of a structure of one term, and the least squares problem that it solves.

    The other factors give z of shape (batch, contracted, free, in_features); b, s, d, i in einsums, and e for new.
    W and W C are (batch, new, free, in_features).
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
        if len(s.terms) > 1 or len(term.factors) < 2 or set(term.inputs) & set(term.outputs):
            return None
        if count(last.batch + last.contracted + last.free, sizes) > _CHEAP * s.out_features:
            return None
        if last.free and count(term.outputs, sizes) > s.out_features:
            # padding rows would count, since they share entries of the factor with outputs
            return None

        def by_row(matrix: Tensor) -> Tensor:
            groups = (last.batch, last.new, last.free, term.inputs)
            return merge(unfold(matrix, s, term), outer_axes(term), groups)[..., : s.in_features]

        return cls(s, term, c, by_row(w), by_row(w @ c))

    @torch.no_grad()
    def best(self, others: Sequence[Tensor]) -> Tensor:
        """The last factor of least error, given the others."""
        last, z = self.term.factors[-1], self._multiplied(others)
        groups = (last.batch, last.new, last.contracted)
        return unmerge(self._solved(z, z @ self.c), groups, last.axes, dict(self.s.sizes))

    def error(self, others: Sequence[Tensor]) -> Tensor:
        """The error with the best last factor. Its gradient is that for a fixed last factor (envelope theorem)."""
        z = self._multiplied(others)
        with torch.no_grad():
            zc = z @ self.c
            solved = self._solved(z, zc)
            residual = self.wc - torch.einsum("bes,bsdi->bedi", solved, zc)
            error = ((self.w - torch.einsum("bes,bsdi->bedi", solved, z)) * residual).sum()
            slope = -2 * torch.einsum("bes,bedi->bsdi", solved, residual)
        return error + ((z - z.detach()) * slope).sum()

    def _solved(self, z: Tensor, zc: Tensor) -> Tensor:
        """The last factor as matrices, (batch, new, contracted)."""
        gram = torch.einsum("bsdi,btdi->bst", zc, z).double()
        right = torch.einsum("bsdi,bedi->bse", z, self.wc).double()
        mean = gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)
        for ridge in _RIDGES:
            root, failed = torch.linalg.cholesky_ex(gram + ridge * mean * torch.eye(gram.shape[1]).to(gram))
            if not failed.any():
                break
        return torch.cholesky_solve(right, root).to(z.dtype).transpose(1, 2)

    def _multiplied(self, others: Sequence[Tensor]) -> Tensor:
        """The product z of the other factors, (batch, contracted, free, in_features)."""
        last, sizes = self.term.factors[-1], dict(self.s.sizes)
        groups = (last.batch, last.contracted, last.free)
        source = sum(groups, ())
        subscripts, operands = [factor.axes for factor in self.term.factors[:-1]], [*others]
        inputs = []
        for axis in self.term.inputs:
            # an input axis that reaches the last factor is a diagonal of z, by an identity
            if axis in source:
                subscripts.append((axis, f"{axis}'"))
                operands.append(torch.eye(sizes[axis]).to(others[0]))
            inputs.append(f"{axis}'" if axis in source else axis)
        z = einsum(subscripts, (*source, *inputs), *operands)
        return z.reshape([count(axes, sizes) for axes in (*groups, self.term.inputs)])[..., : self.s.in_features]
