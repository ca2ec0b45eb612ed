"""Muon, for structured layers block by block."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for parameters that are batches of matrices, such as factors.

    Args:
        groups: the groups of ``param_groups(..., optimizer="muon")`` that have "matrix_view". AdamW takes the others.
        lr, weight_decay: for groups without their own; the decay is decoupled, as in AdamW.
        momentum: of the running mean of gradients, with Nesterov's correction.

    Example:
        >>> import torch, einlinear as el
        >>> groups = el.param_groups(el.Linear(256, 256, "btt"), lr=3e-3, base=None, optimizer="muon")
        >>> muon = el.mup.Muon([group for group in groups if "matrix_view" in group])
        >>> adamw = torch.optim.AdamW([group for group in groups if "matrix_view" not in group])
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            order, fan_out, fan_in = group["matrix_view"]
            momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
            blocks = momenta.permute(0, *(1 + i for i in order))
            updates = orthogonalised(blocks.reshape(-1, fan_out, fan_in)).reshape(blocks.shape)
            inverse = sorted(range(len(order)), key=order.__getitem__)
            for p, update in zip(params, updates.to(momenta.dtype), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(_divided_like(update.permute(inverse), p), alpha=group["lr"] * group["update_scale"])
        return loss

    def _momentum(self, p: Any, momentum: float) -> Any:
        """Return a full tensor, also of tensors that FSDP divides: every process orthogonalises full matrices."""
        if not (state := self.state[p]):
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum)
        return mean.full_tensor() if hasattr(mean, "full_tensor") else mean


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (batch, m, n) with the same singular vectors and all singular values from about 0.7 to 1.2."""
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


def _divided_like(x: Tensor, like: Any) -> Tensor:
    """Return this process's part of a full tensor, if `like` is divided."""
    if not hasattr(like, "full_tensor"):
        return x
    # importing DTensors takes long
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(x.contiguous(), like.device_mesh, [Replicate()])
    return replicated.redistribute(placements=like.placements)
