"""Tensor parallelism of structured layers: styles for torch's `parallelize_module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInputOutput, RowwiseParallel

from einlinear.integrations.parallel_layers import (
    LayerShare,
    ParallelEmbedding,
    ParallelExperts,
    ParallelGatedExperts,
    ParallelLayer,
    ParallelLinear,
    ParallelMoELinear,
)
from einlinear.nn import Embedding, Experts, FeedForward, GatedExperts, Linear, MoEFeedForward, MoELinear
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.structures import sharding
from einlinear.structures.sharding import Sharding


class Colwise(ColwiseParallel):
    """Split the output features of a layer over the devices of a mesh: torch's `ColwiseParallel` for any structure.

    Factors become DTensors, sharded along the slowest axis of the output features, or replicated if they lack it. Each
    device multiplies with a smaller structure, `einlinear.structures.sharding.shard`. The forward pass needs no
    communication. The backward pass sums the gradient of the input, or of the features before the first sharded
    factor. A layer with `normalize` also sums one number for each factor.

    Some modules are split in another way:

    - A `FeedForward` by its hidden features: `up` and `gate` are colwise, `down` is rowwise, and the outputs are
      replicated by default. `einlinear.nn.GatedExperts` likewise, for replicated tokens only, with one all-reduce.
    - A `MoELinear` by the output features of all its experts.
    - An `Embedding` by the features of its rows, as torch splits a `torch.nn.Embedding`. Lookups need no communication.

    `torch.nn.Linear` and `torch.nn.Embedding` are handled by torch.

    Args:
        input_layouts, output_layouts, use_local_output: as for `ColwiseParallel`, by default replicated inputs, and
            outputs that are sharded along the last dimension, as local tensors.

    Raises:
        TypeError: on `parallelize_module`, a module of another class.
        DoesNotFit: a ValueError: the number of devices does not divide the axis, or the output features are padded.
        ValueError: a layer that is parallel already; a mesh of several dimensions; layouts for `GatedExperts`.

    Example:
        >>> import torch, einlinear as el
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from einlinear.integrations.tensor_parallel import Colwise, Rowwise
        >>> plan = {"attention.query": Colwise(), "attention.out": Rowwise(), "feed_forward": Colwise()}
        >>> def parallelize(block: torch.nn.Module, mesh) -> torch.nn.Module:  # under torchrun
        ...     return parallelize_module(block, mesh, plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FeedForward):
            return self._apply_to_block(module, device_mesh)
        if isinstance(module, GatedExperts):
            return self._apply_to_experts(module, device_mesh)
        if isinstance(module, nn.Linear | nn.Embedding):
            return super()._apply(module, device_mesh)
        return _parallelize(self, module, device_mesh, _side(self, module))

    def _apply_to_block(self, block: FeedForward, mesh: DeviceMesh) -> nn.Module:
        layers: list[nn.Module] = [layer for layer in (block.up, block.gate) if layer is not None]
        for layer in (*layers, block.down):
            _sharding(self, layer, mesh, "in" if layer is block.down else "out")
        layout = Replicate() if self.output_layouts == (Shard(-1),) else self.output_layouts[0]
        first, last = Colwise(), Rowwise(output_layouts=layout, use_local_output=False)
        first.src_data_rank = last.src_data_rank = self.src_data_rank
        for layer in layers:
            first._apply(layer, mesh)
        last._apply(block.down, mesh)
        # layers of one input sum its gradients once
        prepare = PrepareModuleInputOutput(
            input_layouts=self.input_layouts,
            desired_input_layouts=(Replicate(),),
            output_layouts=(layout,),
            desired_output_layouts=(layout,),
            use_local_output=self.use_local_output,
        )
        return prepare._apply(block, mesh)

    def _apply_to_experts(self, experts: GatedExperts, mesh: DeviceMesh) -> nn.Module:
        is_local = self.output_layouts in ((Shard(-1),), (Replicate(),)) and self.use_local_output
        if self.input_layouts != (Replicate(),) or not is_local:
            raise ValueError("GatedExperts take replicated tokens and return replicated ones: use Colwise()")
        stacks = [(stack, "in" if stack is experts.down else "out") for stack in experts.stacks().values()]
        for stack, side in stacks:
            _sharding(self, stack, mesh, side, _STACKS)
        for stack, side in stacks:
            _parallelize(self, stack, mesh, side, _STACKS)
        experts.__class__ = ParallelGatedExperts
        return experts


class Rowwise(RowwiseParallel):
    """Split the input features of a layer over the devices of a mesh: torch's `RowwiseParallel` for any structure.

    The counterpart of `Colwise` along the slowest axis of the input features. The forward pass sums the outputs of the
    devices, or the features after the last sharded factor, in one all-reduce. The backward pass needs no
    communication. The router of a `MoELinear` needs all inputs, which are gathered for it.

    An `Embedding` is split by its rows, as torch splits a `torch.nn.Embedding`: pass input_layouts=Replicate(), and
    every lookup sums the rows that the devices found, in one all-reduce. An output head with the same table has its
    factors sharded alike by `Colwise`. To tie the two, assign the factors of one to the other afterwards.

    Args:
        input_layouts, output_layouts, use_local_output: as for `RowwiseParallel`, by default inputs that are sharded
            along the last dimension, and replicated outputs, as local tensors.

    Raises:
        TypeError, DoesNotFit, ValueError: as `Colwise`; a `FeedForward` and `GatedExperts` take `Colwise` only.
        RuntimeError: on call, an input that has not the features of one device.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FeedForward | GatedExperts):
            wrong = f"Rowwise has no meaning for a {type(module).__name__}"
            raise TypeError(f"{wrong}, whose hidden features are split: use Colwise")
        if isinstance(module, nn.Linear | nn.Embedding):
            return super()._apply(module, device_mesh)
        return _parallelize(self, module, device_mesh, _side(self, module))


def check_layer(style: Colwise | Rowwise, layer: nn.Module, mesh: DeviceMesh) -> None:
    """Raise what `parallelize_module` would raise for a structured layer with factors of its own."""
    _sharding(style, layer, mesh, _side(style, layer))


def _side(style: Colwise | Rowwise, layer: nn.Module) -> str:
    """Return the side of a structured matrix that is split: the output features of a table are its rows."""
    return "out" if isinstance(style, Colwise) != isinstance(layer, Embedding) else "in"


_CLASSES: dict[type[nn.Module], type[ParallelLayer]] = {
    Linear: ParallelLinear,
    Embedding: ParallelEmbedding,
    MoELinear: ParallelMoELinear,
}
# inside of GatedExperts
_STACKS: dict[type[nn.Module], type[ParallelLayer]] = {Experts: ParallelExperts}


def _parallelize(
    style: Colwise | Rowwise, module: nn.Module, mesh: DeviceMesh, side: str, classes: Any = _CLASSES
) -> nn.Module:
    """Make a structured layer parallel in place, and return it."""
    split = _sharding(style, module, mesh, side, classes)
    layer: Any = module
    share = LayerShare(style, mesh, split, is_stacked=bool(layer.stack_shape))
    names = [factor.name for factor in split.structure.factors]
    placements: dict[str, Placement] = dict(zip(names, share.placements, strict=True))
    if side == "out":
        placements["bias"] = Shard(0)
    for name, parameter in [*layer._parameters.items()]:
        # routers multiply whole inputs
        if parameter is not None and name != "router":
            placement = placements.get(name, Replicate())
            tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=style.src_data_rank)
            setattr(layer, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    layer.__class__ = classes[type(layer)]
    layer.parallel = share
    return layer  # type: ignore[no-any-return]


def _sharding(
    style: Colwise | Rowwise,
    module: nn.Module,
    mesh: DeviceMesh,
    side: str,
    classes: Mapping[type[nn.Module], Any] = _CLASSES,
) -> Sharding:
    """Return how devices share a layer; raise for a layer that they cannot share."""
    name, kind = type(style).__name__, type(module).__name__
    if isinstance(module, ParallelLayer):
        raise ValueError(f"{name} on a layer that is parallel already: name every layer once in the plan")
    if isinstance(module, QuantizedLinear):
        raise TypeError(f"{name} is not for a {kind}: compress with count='params', which keeps factors as parameters")
    if isinstance(module, MoEFeedForward):
        raise TypeError(f"{name} is not for a {kind}: divide its experts by einlinear.nn.moe.parallel.expert_parallel")
    if type(module) not in classes or "forward" in vars(module):
        allowed = "einlinear.Linear, Embedding, FeedForward and MoELinear, nn.GatedExperts"
        raise TypeError(f"{name} is for {allowed}, torch.nn.Linear and torch.nn.Embedding, not for {kind}")
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions: pass the one for tensor parallelism, such as mesh['tp']"
        )
    if isinstance(style, Rowwise) and style.output_layouts[0].is_partial():
        raise ValueError("output_layouts of Rowwise must be Replicate() or Shard(dim), not Partial()")
    layer: Any = module
    if isinstance(layer, Experts) and layer.exchange is not None:
        raise ValueError(f"{name} on a layer whose experts are sharded already by expert_parallel")
    # the factors of experts are applied together, token by token, and those of tables index by index
    return sharding.shard(layer.structure, side, mesh.size(), can_cut=not isinstance(layer, Experts | Embedding))
