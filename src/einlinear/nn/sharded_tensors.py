"""Whole tensors of sharded ones (DTensor), and the other way round; other tensors stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def full_tensor(x: Any) -> Any:
    """Return the whole tensor, gathered from all processes if it is sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def sharded_like(x: Tensor, like: Any) -> Tensor:
    """Return this process's part of a full tensor, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return x
    # importing DTensors takes long
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(x.contiguous(), like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return replicated.redistribute(placements=like.placements)
