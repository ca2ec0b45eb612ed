"""Muon: gradient descent by orthogonal matrices, for structured layers block by block.

Jordan et al., https://kellerjordan.github.io/posts/muon. `torch.optim.Muon` takes one matrix per parameter, while a
factor of a structured layer is a batch of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the odd polynomial that brings singular values near 1 in the fewest steps
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one, about.

    Args:
        groups: those of ``param_groups(..., optimizer="muon")`` that have "matrices". AdamW takes the others.
        lr: unless a group has its own.
        momentum: of the running mean of gradients, with Nesterov's correction.
        weight_decay: decoupled, as AdamW's, unless a group has its own.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear.mup import Muon
        >>> layer, base = el.Linear(256, 256, "btt"), torch.nn.Linear(64, 64)
        >>> groups = el.param_groups(layer, lr=3e-3, base=base, optimizer="muon")
        >>> muon = Muon([group for group in groups if "matrices" in group])
        >>> adamw = torch.optim.AdamW([group for group in groups if "matrices" not in group])
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            order, fan_out, fan_in = group["matrices"]
            whole = torch.stack([_gathered(self._momentum(p, group["momentum"])) for p in moved])
            blocks = whole.permute(0, *(1 + i for i in order))
            updates = orthogonalised(blocks.reshape(-1, fan_out, fan_in)).reshape(blocks.shape)
            inverse = sorted(range(len(order)), key=order.__getitem__)
            for p, update in zip(moved, updates.to(whole.dtype), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(_shared(update.permute(inverse), p), alpha=group["lr"] * group["size"])
        return loss

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        assert p.grad is not None
        mean: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(batch, m, n) -> the same, with the same singular vectors and all singular values between about 0.7 and 1.2.

    On a GPU in bfloat16, which is exact enough for that.
    """
    x: Tensor = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # so that the products below are of the smaller size
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _gathered(x: Tensor) -> Tensor:
    """All of a tensor that FSDP shards: every process orthogonalises whole matrices."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _shared(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of it again."""
    if not isinstance(like, DTensor):
        return x
    part: Tensor = DTensor.from_local(x.contiguous(), like.device_mesh, [Replicate()]).redistribute(
        placements=like.placements
    )
    return part
