"""Expert parallelism: every process keeps a share of the experts, and tokens travel to their experts."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from einlinear.nn.moe.exchange import Exchange
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
