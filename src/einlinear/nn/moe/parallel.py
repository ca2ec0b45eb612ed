"""Expert parallelism: every process keeps a share of the experts, and tokens travel to their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from einlinear.nn.moe.experts import ExpertStack
from einlinear.nn.names import plain_modules


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Divide the experts of all mixtures of a model among the processes of a mesh, in place.

    Their parameters become DTensors, sharded along the first axis, with the values of the first process. Tokens are
    exchanged by all-to-all, without a capacity. Gradients are those of the mean of the processes' losses, as in
    DistributedDataParallel, which has to ignore these parameters.

    Args:
        model: with the same parameters on all processes, before it is wrapped and before an optimizer is made.
        mesh: of one dimension, with all processes that share a batch.

    Returns:
        The names of the divided parameters.

    Raises:
        ValueError: no mixture, a mixture whose experts cannot be divided equally or are divided already, a mesh of
            another dimension. The model is unchanged then.
    """
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions: experts are divided among the processes of one")
    layers = {name: module for name, module in plain_modules(model) if isinstance(module, ExpertStack)}
    if not layers:
        raise ValueError("the model has no layers with experts")
    for name, module in layers.items():
        if module.exchange is not None:
            raise ValueError(f"the experts of {name or 'the layer'} are divided already")
        if module.experts % mesh.size():
            raise ValueError(
                f"{name or 'the layer'} has {module.experts} experts: {mesh.size()} processes cannot share them equally"
            )
    # a layer may have several names
    for module in dict.fromkeys(layers.values()):
        for key in module.stacked:
            parameter = getattr(module, key)
            divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            setattr(module, key, nn.Parameter(divided, requires_grad=parameter.requires_grad))
        module.exchange = Exchange(mesh, module.experts)
    return [f"{name}.{key}".lstrip(".") for name, module in layers.items() for key in module.stacked]


class Exchange:
    """All-to-all exchange of a layer's tokens: every process has an equal share of experts, by rank."""

    def __init__(self, mesh: DeviceMesh, experts: int) -> None:
        self.mesh, self.size = mesh, mesh.size()
        self.experts_per_process = experts // self.size

    @property
    def group(self) -> distributed.ProcessGroup:
        # looked up each time: copies and files can have a mesh, but no group
        return self.mesh.get_group()

    def local(self, parameter: Any) -> Tensor:
        """Return this process's experts, whose gradient is a mean over the processes instead of a sum."""
        local: Tensor = parameter.to_local()
        if local.requires_grad:
            local.register_hook(lambda grad: grad / self.size)
        return local

    def __call__(
        self, x: Tensor, indices: Tensor, gates: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the sums of gate * W_expert x for tokens (n, in_features), with indices and gates (n, active).

        n may differ between processes; `multiply` computes the products of (m, in_features) tokens with (m,) of this
        process's experts.
        """
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        tokens = order // indices.shape[1]
        # the numbers of tokens that this process sends to each process, and receives from each
        sent = torch.bincount(flat // self.experts_per_process, minlength=self.size)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self.group)
        to, from_ = torch.stack((sent, received)).tolist()
        gated = x[tokens] * gates.flatten()[order, None].to(x.dtype)
        inputs = self._send(gated, to, from_)
        experts = self._send(flat[order] % self.experts_per_process, to, from_)
        outputs = self._send(multiply(inputs, experts), from_, to)
        return outputs.new_zeros(x.shape[0], outputs.shape[1]).index_add(0, tokens, outputs)

    def _send(self, rows: Tensor, to: list[int], from_: list[int]) -> Tensor:
        return _AllToAll.apply(rows, to, from_, self.group)  # type: ignore[no-any-return, no-untyped-call]


class _AllToAll(torch.autograd.Function):
    """Send the first `to[0]` rows to the first process and so on, and receive `from_` rows; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], from_: list[int], group: distributed.ProcessGroup) -> Tensor:
        ctx.to, ctx.from_, ctx.group = to, from_, group
        received = rows.new_empty(sum(from_), *rows.shape[1:])
        distributed.all_to_all_single(received, rows.contiguous(), from_, to, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], ctx.from_, ctx.to, ctx.group), None, None, None  # type: ignore[no-untyped-call]
