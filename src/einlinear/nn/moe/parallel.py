"""Expert parallelism: every process keeps a share of the experts, and tokens travel to their experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from einlinear.nn.moe.mixture import Experts
from einlinear.nn.names import plain_modules


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Divide the experts of all mixtures of a model among processes, in place; returns the parameters' names.

    Their parameters become DTensors, sharded along the first axis, with the values of the first process. Tokens are
    exchanged by all-to-all, without a capacity. Gradients are those of the mean of the processes' losses, as in
    DistributedDataParallel, which has to ignore these parameters.

    Args:
        model: with the same parameters on all processes, before it is wrapped and before an optimizer is made.
        mesh: of one dimension, with all processes that share a batch.

    Raises:
        ValueError: no mixture, experts that cannot be sharded equally, already are, or are normalised together; a mesh
            of several dimensions.
    """
    size = mesh.size()
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions: experts are sharded over one")
    layers = {name: module for name, module in plain_modules(model) if isinstance(module, Experts)}
    if not layers:
        raise ValueError("the model has no layers with experts")
    for name, module in layers.items():
        where = name or "the layer"
        if module.exchange is not None:
            raise ValueError(f"the experts of {where} are sharded already")
        if module.normalize and module.normalizes_stack:
            raise ValueError(f"{where} normalises its experts together: they cannot be sharded")
        if module.experts % size:
            raise ValueError(f"{where} has {module.experts} experts: {size} processes cannot share them equally")
    names = []
    for name, module in layers.items():
        # all others have an entry for every expert
        keys = [key for key in module._parameters if key not in ("bias", "router")]
        names += [f"{name}.{key}".lstrip(".") for key in keys]
        # a layer may have several names
        if module.exchange is None:
            for key in keys:
                parameter = getattr(module, key)
                sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(module, key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
            module.exchange = Exchange(mesh, module.experts)
    return names


class Exchange:
    """All-to-all exchange of a layer's tokens: every process has an equal share of experts, by rank."""

    def __init__(self, mesh: DeviceMesh, experts: int) -> None:
        self.mesh, self.size = mesh, mesh.size()
        self.experts_per_process = experts // self.size

    def local(self, parameter: Any) -> Tensor:
        """Return this process's experts, whose gradient is a mean over the processes instead of a sum."""
        local: Tensor = parameter.to_local()
        if local.requires_grad:
            local.register_hook(lambda grad: grad / self.size)
        return local

    def __call__(self, x: Tensor, indices: Tensor, gates: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        """Return the sums of gate * W_expert x; `multiply` takes (m, in_features) tokens and m local experts."""
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        tokens = order // indices.shape[1]
        # the numbers of tokens that this process sends to each process, and receives from each
        sent = torch.bincount(flat // self.experts_per_process, minlength=self.size)
        received = torch.empty_like(sent)
        # looked up each time: copies and files can have a mesh, but no group
        group = self.mesh.get_group()
        distributed.all_to_all_single(received, sent, group=group)
        to, from_ = torch.stack((sent, received)).tolist()
        gated = x[tokens] * gates.flatten()[order, None].to(x.dtype)
        send: Callable[..., Tensor] = _AllToAll.apply
        experts = send(flat[order] % self.experts_per_process, to, from_, group)
        outputs = send(multiply(send(gated, to, from_, group), experts), from_, to, group)
        return outputs.new_zeros(x.shape[0], outputs.shape[1]).index_add(0, tokens, outputs)


class _AllToAll(torch.autograd.Function):
    """Send the first `to[0]` rows to the first process and so on, and receive `from_` rows; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], from_: list[int], group: distributed.ProcessGroup) -> Tensor:
        ctx.back = from_, to, group
        received = rows.new_empty(sum(from_), *rows.shape[1:])
        distributed.all_to_all_single(received, rows.contiguous(), from_, to, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], *ctx.back), None, None, None  # type: ignore[no-untyped-call]
