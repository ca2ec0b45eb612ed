"""Muon, for structured layers block by block, or by what two factors do to their product; AdamW for the rest."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from einlinear.nn.sharded_tensors import full_tensor, sharded_like

# order of axes, rows and columns: ``x.permute(order).reshape(-1, rows, columns)`` is a batch of matrices
View: TypeAlias = tuple[Sequence[int], int, int]


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for batches of matrices, such as factors; AdamW for the rest.

    Muon moves the groups that have "matrix_view", AdamW the others.

    In groups of ``param_groups(..., product=True)``, two factors with the product W = B A move together, by the
    steepest descent under the spectral norms of B dA and dB A: ``dA = S^-1 orth(S^-1 G)`` for the momentum G of A,
    where ``S^2 = B^T B`` is the Gram matrix of B over the inner axes (those in neither input nor output), for every
    entry of the other axes that both factors have. With no inner axis it is a number. The steps of W do not depend on
    how the factors share its scale, or on the basis of the inner axes.

    Each of the two updates moves W by at most half the spectral norm of the update of a dense layer: it is divided by
    the largest spectral norm of the matrices of ``B S^-1``. See `product_updates` for factors near zero.

    Args:
        groups: all groups of ``param_groups(..., optimizer="muon")``.
        lr, weight_decay: for groups without their own; the decay is decoupled, as in AdamW.
        momentum: of Muon's running mean of gradients, with Nesterov's correction.
        betas, eps, fused: of AdamW, as in torch.

    Example:
        >>> import einlinear as el
        >>> groups = el.param_groups(el.Linear(256, 256, "btt"), lr=3e-3, base=None, optimizer="muon")
        >>> optimizer = el.mup.Muon(groups, weight_decay=0.1)
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        fused: bool | None = None,
    ) -> None:
        of_adamw = {"betas": betas, "eps": eps, "fused": fused}
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **of_adamw})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if "gram_views" in group:
                self._step_products(group)
            elif not (params := [p for p in group["params"] if p.grad is not None]):
                continue
            elif "matrix_view" not in group:
                self._step_adamw(params, group)
            else:
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                updates = orthogonalised(as_matrices(momenta, group["matrix_view"]))
                _move(params, from_matrices(updates, group["matrix_view"], momenta.shape), group)
        return loss

    def _step_products(self, group: dict[str, Any]) -> None:
        # first and second factors alternate
        pairs = zip(group["params"][::2], group["params"][1::2], strict=True)
        if trained := [pair for pair in pairs if any(p.grad is not None for p in pair)]:
            sides = list(zip(*trained, strict=True))
            factors = [torch.stack([full_tensor(p) for p in side]) for side in sides]
            momenta = [torch.stack([self._momentum(p, group["momentum"]) for p in side]) for side in sides]
            size = group["lr"] * group["update_scale"]
            updates = product_updates(factors, momenta, group["matrix_view"], group["gram_views"], size)
            for side, update in zip(sides, updates, strict=True):
                _move(side, update, group)

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                # torch's fused kernel counts on the device
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        means, squares, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        options = {key: group[key] for key in ("lr", "weight_decay", "eps", "fused")}
        options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
        gradients: Any = [p.grad for p in params]
        adamw(params, gradients, means, squares, [], steps, **options)

    def _momentum(self, p: Any, momentum: float) -> Any:
        """Return a full tensor, also of tensors that FSDP divides: every process orthogonalises full matrices."""
        if p.grad is None:
            return full_tensor(torch.zeros_like(p))
        if not (state := self.state[p]):
            state["momentum_buffer"] = torch.zeros_like(p)
        return full_tensor(p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (..., m, n) with the same singular vectors and all singular values from about 0.7 to 1.2."""
    # bfloat16 is exact enough for that
    x: Tensor = matrices.bfloat16() if matrices.is_cuda else matrices
    # the products below are of the smaller of the two sizes
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # the odd polynomial that brings singular values near 1 in the fewest steps
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def product_updates(
    factors: Sequence[Tensor], momenta: Sequence[Tensor], views: Sequence[View], gram_views: Sequence[View], size: float
) -> list[Tensor]:
    """Return the updates of the two factors of equal terms, over `size`: each moves W by a spectral norm up to about 1.

    Factors and momenta are stacked, with any number of axes before their own. `views` are those of the matrices that
    are orthogonalised. The rows of `gram_views` are the inner axes, the columns the axes of this factor alone.

    With S = L L^T for the Gram matrix of the other factor F, the update is L^-T orth(L^-1 G) / norm(L^-1 F). The norm
    of the whitened F is 1 for a single block, and depends on their directions for many. Gram matrices are damped in
    proportion to their traces. That of the second factor is taken after a step of its own: where W is smaller than a
    step, also from zero, the product of both updates is then no larger than each of them.
    """
    # Gram matrices are sums of many squares
    dtype = torch.promote_types(factors[0].dtype, torch.float32)
    terms = [_Factor(*entries, dtype) for entries in zip(factors, momenta, views, gram_views, strict=True)]
    first, second = terms
    # the second update is an orthogonal matrix times the inverse root of the first Gram matrix
    own = torch.cholesky_inverse(first.root) * (size / first.norm).square()
    damped = _root(second.gram + torch.where(_trace(first.gram) > 0, own, 0), second.is_singular)
    return [first.update(damped, second.norm), second.update(first.root, first.norm)]


class _Factor:
    """One of the two factors of equal terms, (terms, ...), and its momentum."""

    def __init__(self, factor: Tensor, momentum: Tensor, view: View, gram_view: View, dtype: torch.dtype) -> None:
        self.stacked_shape = factor.shape
        # of the axes of stacked layers and experts, one
        own = factor.shape[factor.dim() - len(view[0]) :]
        self.shape, self.view, self.gram_view = (-1, *own), view, gram_view
        rows = as_matrices(factor.to(dtype).reshape(self.shape), gram_view)
        self.momentum = as_matrices(momentum.to(dtype).reshape(self.shape), gram_view)
        self.is_singular = gram_view[1] > gram_view[2]
        self.gram = rows @ rows.mT
        self.root = _root(self.gram, self.is_singular)
        norm = _spectral_norm(self._matrices(torch.linalg.solve_triangular(self.root, rows, upper=False)))
        norm = norm.amax(1, keepdim=True)
        # a zero factor has none
        self.norm = torch.where(norm > 0, norm, 1)

    def update(self, root: Tensor, norm: Tensor) -> Tensor:
        """Return the update for the root of the other factor's Gram matrices and the norm of that factor, whitened."""
        matrices = self._matrices(torch.linalg.solve_triangular(root, self.momentum, upper=False))
        step = from_matrices(orthogonalised(matrices).to(matrices.dtype), self.view, self.shape)
        rows = torch.linalg.solve_triangular(root.mT, as_matrices(step, self.gram_view), upper=True) / norm
        return from_matrices(rows, self.gram_view, self.shape).reshape(self.stacked_shape)

    def _matrices(self, rows: Tensor) -> Tensor:
        return as_matrices(from_matrices(rows, self.gram_view, self.shape), self.view)


def _root(gram: Tensor, is_singular: bool) -> Tensor:
    """Return Cholesky factors of Gram matrices (..., r, r), damped so that no rounding makes them indefinite."""
    identity, trace = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), _trace(gram)
    damping = 1e-2 / len(identity) if is_singular else 8 * torch.finfo(gram.dtype).eps
    # a zero factor does not move the other, whatever the root
    root, failed = torch.linalg.cholesky_ex(torch.where(trace == 0, identity, gram + damping * trace * identity))
    # where TF32 has computed the Gram matrix, or it is not finite
    return torch.where(failed[..., None, None] > 0, (trace / len(identity)).sqrt() * identity, root)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _spectral_norm(matrices: Tensor) -> Tensor:
    """Return an upper bound of the norms of matrices (..., m, n), at most min(m, n)^(1/16) times as large."""
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    square = gram @ gram
    by_powers: Tensor = torch.linalg.matrix_norm(square @ square, keepdim=True) ** 0.25
    # exact for orthogonal rows
    by_rows = gram.abs().sum(-1).amax(-1)[..., None, None]
    return torch.minimum(by_powers, by_rows).sqrt()


def as_matrices(stack: Tensor, view: View) -> Tensor:
    order, rows, columns = view
    return stack.permute(0, *(1 + i for i in order)).reshape(len(stack), -1, rows, columns)


def from_matrices(matrices: Tensor, view: View, shape: Sequence[int]) -> Tensor:
    order = view[0]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape(len(matrices), *(shape[1 + i] for i in order)).permute(0, *(1 + i for i in inverse))


def _move(params: Iterable[Tensor], updates: Tensor, group: dict[str, Any]) -> None:
    for p, update in zip(params, updates, strict=True):
        if p.grad is not None:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(sharded_like(update.to(p.dtype), p), alpha=group["lr"] * group["update_scale"])
