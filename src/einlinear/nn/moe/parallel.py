"""Expert parallelism: every process keeps some of the experts, and tokens travel to those that they are sent to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from einlinear.nn.moe.experts import Stacked
from einlinear.nn.names import plain_modules


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Divide the experts of all mixtures of a model among the processes of a mesh, in place.

    Their parameters become DTensors, sharded along their first axis; those of the first process are taken. Tokens are
    exchanged by all-to-all, without a capacity. Gradients are those of the mean of the processes' losses, as
    DistributedDataParallel makes them: tell that to leave these parameters alone.

    Args:
        model: whose parameters are the same on all processes, before it is wrapped and before an optimizer is made.
        mesh: of one dimension, of all processes that share a batch.

    Returns:
        The names of the parameters that are divided.

    Raises:
        ValueError: no mixture, one whose experts the processes cannot share equally or share already, a mesh of
            another dimension. The model is as it was.
    """
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions: experts are divided among the processes of one")
    layers = {name: module for name, module in plain_modules(model) if isinstance(module, Stacked)}
    if not layers:
        raise ValueError("the model has no layers with experts")
    for name, module in layers.items():
        if module.exchange is not None:
            raise ValueError(f"the experts of {name or 'the layer'} are divided already")
        if module.experts % mesh.size():
            raise ValueError(
                f"{name or 'the layer'} has {module.experts} experts: {mesh.size()} processes cannot share them equally"
            )
    for module in dict.fromkeys(layers.values()):  # a layer may have several names
        for own in module.stacked:
            parameter = getattr(module, own)
            whole = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            setattr(module, own, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        module.exchange = Exchange(mesh, module.experts)
    return [f"{name}.{own}".lstrip(".") for name, module in layers.items() for own in module.stacked]


class Exchange:
    """How the tokens of a layer travel.

    Args:
        mesh: of the processes.
        experts: how many the layer has; every process has as many of them, in the order of the ranks.
    """

    def __init__(self, mesh: DeviceMesh, experts: int) -> None:
        self.mesh, self.size = mesh, mesh.size()
        self.share = experts // self.size  # of every process

    @property
    def group(self) -> distributed.ProcessGroup:
        return self.mesh.get_group()  # asked for each time: copies and files can have a mesh, but no group

    def own(self, parameter: Tensor) -> Tensor:
        """This process's experts. Their gradient is a sum over the tokens of all processes, where a mean is wanted."""
        assert isinstance(parameter, DTensor)
        own: Tensor = _Share.apply(parameter.to_local(), self.size)  # type: ignore[no-untyped-call]
        return own

    def __call__(
        self, x: Tensor, indices: Tensor, gates: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """For every token the sum of gate * W_expert x, of which `multiply` does the products.

        Args:
            x: (n, in_features); n may differ between processes.
            indices, gates: (n, active).
            multiply: of (m, in_features) tokens and (m,) of this process's experts, to (m, out_features).
        """
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        tokens = order // indices.shape[1]
        sent = torch.bincount(flat // self.share, minlength=self.size)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self.group)
        there, here = torch.stack((sent, received)).tolist()
        inputs = x[tokens] * gates.flatten()[order, None].to(x.dtype)
        arrived = self._travel(inputs, there, here)
        wanted = self._travel(flat[order] % self.share, there, here)
        back = self._travel(multiply(arrived, wanted), here, there)
        return back.new_zeros(x.shape[0], back.shape[1]).index_add(0, tokens, back)

    def _travel(self, rows: Tensor, there: list[int], here: list[int]) -> Tensor:
        arrived: Tensor = _Travel.apply(rows, there, here, self.group)  # type: ignore[no-untyped-call]
        return arrived


class _Travel(torch.autograd.Function):
    """The first `there[0]` rows to the first process and so on; `here` as many come from each. Gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: list[int], here: list[int], group: distributed.ProcessGroup) -> Tensor:
        ctx.there, ctx.here, ctx.group = there, here, group
        arrived = rows.new_empty(sum(here), *rows.shape[1:])
        distributed.all_to_all_single(arrived, rows.contiguous(), here, there, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Travel.apply(grads[0], ctx.here, ctx.there, ctx.group), None, None, None  # type: ignore[no-untyped-call]


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.size, None
