"""L-BFGS on the error of a structured matrix's outputs, over all of its factors at once.

Where it is cheap, the last factor is no variable: once the others are known, the best there is solves a linear least
squares problem, so that only the others are searched for (variable projection, Golub and Pereyra). It halves the steps,
of BLAST above all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.ops.projection.unfold import count, outer_axes, permute, unfold
from einlinear.ops.reference import dense_weight, einsum
from einlinear.structures import Structure, Term

MIN_STEPS, MAX_STEPS = 10, 100
TOLERANCE = 1e-3  # of the squared error: when so little is gained by _BETWEEN steps, they are the last
_BETWEEN = 10
_WORK = 10**12  # multiply-accumulates that limit the number of steps, between the two
_CHEAP = 4  # times the entries of W that what the last factor multiplies may have, for it to be solved for
_RIDGES = (1e-7, 1e-5, 1e-3)  # of the mean: the first with which the equations can be solved

Colours = Callable[[Sequence[Tensor]], list[Tensor]]


def error_of(s: Structure, w: Tensor, c: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """tr((V - W) C (V - W)^T), for the V of the factors."""
    difference = dense_weight(s, factors) - w
    return ((difference @ c) * difference).sum()


def descend(
    s: Structure, w: Tensor, c: Tensor, variables: Sequence[Tensor], coloured: Colours, steps: int | None
) -> list[Tensor]:
    """Factors of a smaller error.

    Args:
        s: the structure.
        w: (out_features, in_features).
        c: the moment, (in_features, in_features).
        variables: where to start, one for each factor.
        coloured: the factors that variables stand for; a last factor stands for itself.
        steps: at most so many; None: as many as pay.
    """
    scale = float(((w @ c) * w).sum())
    if scale == 0:
        return coloured(variables)
    most = min(MAX_STEPS, max(MIN_STEPS, _WORK // (w.numel() * len(c))))
    steps = most if steps is None else min(steps, most)
    last = _Last.of(s, w, c)
    free = [v.contiguous().clone().requires_grad_() for v in (variables[:-1] if last else variables)]

    def searched() -> list[Tensor]:
        return coloured([*free, variables[-1]])[:-1] if last else coloured(free)

    def closure() -> Tensor:
        error = (last.error(searched()) if last else error_of(s, w, c, searched())) / scale
        for variable, gradient in zip(free, torch.autograd.grad(error, free), strict=True):
            variable.grad = gradient.contiguous()
        return error.detach()

    search = torch.optim.LBFGS(
        free, max_iter=_BETWEEN, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    before = math.inf
    with torch.enable_grad():
        for done in range(0, steps, _BETWEEN):
            search.param_groups[0]["max_iter"] = min(_BETWEEN, steps - done)
            error = float(search.step(closure))  # before these steps
            if before - error < TOLERANCE * error:
                break
            before = error
    found = [factor.detach() for factor in searched()]
    return [*found, last.best(found)] if last else found


@dataclass(frozen=True)
class _Last:
    """The last factor of a structure of one term: for every value of the axes that it shares with the output, a matrix
    that multiplies what the others make of the input.

    Attributes:
        s, term: the structure, and its term.
        c: the moment.
        w, wc: W and W C, (batch, introduced, columns, in_features), as the factor's axes say.
    """

    s: Structure
    term: Term
    c: Tensor
    w: Tensor
    wc: Tensor

    @classmethod
    def of(cls, s: Structure, w: Tensor, c: Tensor) -> _Last | None:
        """None where the last factor has to be searched for as well."""
        term, sizes = s.terms[0], dict(s.sizes)
        last = term.factors[-1]
        if len(s.terms) > 1 or len(term.factors) < 2 or set(term.inputs) & set(term.outputs):
            return None
        if count(last.batch + last.contracted + last.free, sizes) > _CHEAP * s.out_features:
            return None
        if last.free and count(term.outputs, sizes) > s.out_features:
            return None  # rows that are no outputs would count, as they share entries of the factor with some that are
        order = (last.batch, last.new, last.free, term.inputs)
        shape = [count(axes, sizes) for axes in order]

        def by_row(matrix: Tensor) -> Tensor:
            unfolded = permute(unfold(matrix, s, term), outer_axes(term), sum(order, ()))
            return unfolded.reshape(shape)[..., : s.in_features]

        return cls(s, term, c, by_row(w), by_row(w @ c))

    @torch.no_grad()
    def best(self, others: Sequence[Tensor]) -> Tensor:
        """The factor that leaves the least error, the others being these."""
        last, sizes = self.term.factors[-1], dict(self.s.sizes)
        z = self._multiplied(others)
        order = last.batch + last.new + last.contracted
        return permute(self._solved(z, z @ self.c).reshape([sizes[axis] for axis in order]), order, last.axes)

    def error(self, others: Sequence[Tensor]) -> Tensor:
        """The error with that factor. To first order in the others it does not matter how it depends on them."""
        z = self._multiplied(others)
        with torch.no_grad():
            zc = z @ self.c
            solved = self._solved(z, zc)
            left = self.wc - torch.einsum("bes,bsdi->bedi", solved, zc)
            error = ((self.w - torch.einsum("bes,bsdi->bedi", solved, z)) * left).sum()
            slope = -2 * torch.einsum("bes,bedi->bsdi", solved, left)
        return error + ((z - z.detach()) * slope).sum()

    def _solved(self, z: Tensor, zc: Tensor) -> Tensor:
        """The factor as matrices, (batch, introduced, summed)."""
        gram = torch.einsum("bsdi,btdi->bst", zc, z).double()
        right = torch.einsum("bsdi,bedi->bse", z, self.wc).double()
        mean = gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)
        for ridge in _RIDGES:
            root, failed = torch.linalg.cholesky_ex(gram + ridge * mean * torch.eye(gram.shape[1]).to(gram))
            if not failed.any():
                break
        return torch.cholesky_solve(right, root).to(z.dtype).transpose(1, 2)

    def _multiplied(self, others: Sequence[Tensor]) -> Tensor:
        """What the last factor multiplies, as a matrix of the input: (batch, summed, columns, in_features)."""
        last, sizes = self.term.factors[-1], dict(self.s.sizes)
        kept = last.batch + last.contracted + last.free
        subscripts, operands = [factor.axes for factor in self.term.factors[:-1]], [*others]
        inputs = []
        for axis in self.term.inputs:  # one that the last factor sums is read as well: a diagonal, by an identity
            if axis in kept:
                subscripts.append((axis, f"{axis}'"))
                operands.append(torch.eye(sizes[axis]).to(others[0]))
            inputs.append(f"{axis}'" if axis in kept else axis)
        z = einsum(subscripts, (*kept, *inputs), *operands)
        shape = [count(axes, sizes) for axes in (last.batch, last.contracted, last.free, self.term.inputs)]
        return z.reshape(shape)[..., : self.s.in_features]
