"""Tensor parallelism of structured layers: styles for torch's `parallelize_module`."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInputOutput, RowwiseParallel

from einlinear import ops
from einlinear.nn import FeedForward, Linear, MoELinear
from einlinear.nn.linear import Factored
from einlinear.structures import sharding
from einlinear.structures.sharding import FactorGroup, Part, Sharding


class Colwise(ColwiseParallel):
    """Split the output features of a layer over the devices of a mesh: torch's `ColwiseParallel` for any structure.

    Factors become DTensors, sharded along the slowest axis of the output features, or replicated if they lack it. Each
    device multiplies with a smaller structure, `einlinear.structures.sharding.shard`. The forward pass needs no
    communication. The backward pass sums the gradient of the input, or of the features before the first sharded
    factor. A layer with `normalize` also sums one number for each factor.

    A `FeedForward` is split by its hidden features: `up` and `gate` are colwise, `down` is rowwise, and the outputs are
    replicated by default. The experts of a `MoELinear` are all split. `torch.nn.Linear` and `torch.nn.Embedding` are
    handled by torch.

    Args:
        input_layouts, output_layouts, use_local_output: as for `ColwiseParallel`, by default replicated inputs, and
            outputs that are sharded along the last dimension, as local tensors.

    Raises:
        TypeError: on `parallelize_module`, a module of another class.
        DoesNotFit: a ValueError: the number of devices does not divide the axis, or the output features are padded.
        ValueError: a layer that is parallel already; a mesh of several dimensions.

    Example:
        >>> import torch, einlinear as el
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from einlinear.integrations.tensor_parallel import Colwise, Rowwise
        >>> plan = {"attention.query": Colwise(), "attention.out": Rowwise(), "feed_forward": Colwise()}
        >>> def parallelize(block: torch.nn.Module, mesh) -> torch.nn.Module:  # under torchrun
        ...     return parallelize_module(block, mesh, plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FeedForward):
            return _apply(self, module, device_mesh, "out") or super()._apply(module, device_mesh)
        layers: list[nn.Module] = [layer for layer in (module.up, module.gate) if layer is not None]
        for layer in (*layers, module.down):
            _sharding(self, layer, device_mesh, "in" if layer is module.down else "out")
        layout = Replicate() if self.output_layouts == (Shard(-1),) else self.output_layouts[0]
        first, last = Colwise(), Rowwise(output_layouts=layout, use_local_output=False)
        first.src_data_rank = last.src_data_rank = self.src_data_rank
        for layer in layers:
            first._apply(layer, device_mesh)
        last._apply(module.down, device_mesh)
        # layers of one input sum its gradients once
        prepare = PrepareModuleInputOutput(
            input_layouts=self.input_layouts,
            desired_input_layouts=(Replicate(),),
            output_layouts=(layout,),
            desired_output_layouts=(layout,),
            use_local_output=self.use_local_output,
        )
        return prepare._apply(module, device_mesh)


class Rowwise(RowwiseParallel):
    """Split the input features of a layer over the devices of a mesh: torch's `RowwiseParallel` for any structure.

    The counterpart of `Colwise` along the slowest axis of the input features. The forward pass sums the outputs of the
    devices, or the features after the last sharded factor, in one all-reduce. The backward pass needs no
    communication. The router of a `MoELinear` needs all inputs, which are gathered for it.

    Args:
        input_layouts, output_layouts, use_local_output: as for `RowwiseParallel`, by default inputs that are sharded
            along the last dimension, and replicated outputs, as local tensors.

    Raises:
        TypeError, DoesNotFit, ValueError: as `Colwise`; a `FeedForward` takes `Colwise` only.
        RuntimeError: on call, an input that has not the features of one device.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FeedForward):
            raise TypeError("Rowwise has no meaning for a FeedForward, whose hidden features are split: use Colwise")
        return _apply(self, module, device_mesh, "in") or super()._apply(module, device_mesh)


def _apply(style: Colwise | Rowwise, module: nn.Module, mesh: DeviceMesh, side: str) -> nn.Module | None:
    """Make a structured layer parallel; return it, or None for the modules that torch's own styles take."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return None
    split = _sharding(style, module, mesh, side)
    layer: Any = module
    placements: dict[str, Placement] = {}
    for factor, axis in zip(split.structure.factors, split.axes, strict=True):
        stacked = len(layer.stack_shape)
        placements[factor.name] = Replicate() if axis is None else Shard(stacked + factor.axes.index(axis))
    if side == "out":
        placements["bias"] = Shard(0)
    for name, parameter in [*layer._parameters.items()]:
        # routers multiply whole inputs
        if parameter is not None and name != "router":
            placement = placements.get(name, Replicate())
            tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=style.src_data_rank)
            setattr(layer, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    layer.__class__ = _CLASSES[type(layer)]
    layer.parallel = _Parallel(style, mesh, split)
    return layer  # type: ignore[no-any-return]


def _sharding(style: Colwise | Rowwise, module: nn.Module, mesh: DeviceMesh, side: str) -> Sharding:
    name = type(style).__name__
    if isinstance(module, _ParallelLinear | _ParallelMoELinear):
        raise ValueError(f"{name} on a layer that is parallel already: name every layer once in the plan")
    if type(module) not in _CLASSES or "forward" in vars(module):
        allowed = "einlinear.Linear, FeedForward and MoELinear, torch.nn.Linear and torch.nn.Embedding"
        raise TypeError(f"{name} is for {allowed}, not for {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions: pass the one for tensor parallelism, such as mesh['tp']"
        )
    if side == "in" and style.output_layouts[0].is_partial():
        raise ValueError("output_layouts of Rowwise must be Replicate() or Shard(dim), not Partial()")
    layer: Any = module
    if isinstance(layer, MoELinear) and layer.exchange is not None:
        raise ValueError(f"{name} on a layer whose experts are sharded already by expert_parallel")
    # the factors of experts are applied together, token by token
    return sharding.shard(layer.structure, side, mesh.size(), whole_terms=isinstance(layer, MoELinear))


class _ParallelLinear(Linear):
    """A `Linear` on one device of several."""

    parallel: _Parallel

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parallel.output(self, self.parallel.input(x))
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.parallel}"


class _ParallelMoELinear(MoELinear):
    """A `MoELinear` on one device of several, with a slice of every expert."""

    parallel: _Parallel

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        parallel = self.parallel
        shared = parallel.input(x)
        tokens = shared.redistribute(placements=[Replicate()]).to_local()
        routing = self.route(tokens.reshape(-1, self.in_features))
        gates = parallel.summed_gradient(routing.gates)
        y: Tensor = parallel.output(self, shared, ops.Routing(routing.indices, gates))
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.parallel}"


_CLASSES: dict[type[nn.Module], type[Factored]] = {Linear: _ParallelLinear, MoELinear: _ParallelMoELinear}


class _Parallel:
    """How a layer runs on one device: with smaller structures, and with communication around them."""

    def __init__(self, style: Colwise | Rowwise, mesh: DeviceMesh, sharding: Sharding) -> None:
        self.mesh, self.sharding, self.is_out = mesh, sharding, sharding.side == "out"
        self.input_layouts, self.output_layouts = style.input_layouts, style.output_layouts
        self.use_local_output = style.use_local_output

    def __str__(self) -> str:
        return f"{'colwise' if self.is_out else 'rowwise'} over {self.sharding.devices} devices"

    def input(self, x: Tensor) -> Any:
        """Return a DTensor whose local features are those that this device multiplies with."""
        y: Any = x if isinstance(x, DTensor) else self.distributed(x, *self.input_layouts)
        y = y.redistribute(placements=[Replicate() if self.is_out else Shard(-1)])
        s = self.sharding.structure
        if y.shape[-1] != s.in_features:
            given = f"the input has shape {tuple(x.shape)} on this device and {tuple(y.shape)} on all"
            needed = f"its last dimension must be in_features={s.in_features}"
            advice = (
                "" if self.is_out else ": make the layer before it Colwise, or give Rowwise input_layouts=Replicate()"
            )
            raise RuntimeError(f"{given}, but {needed}{advice}")
        return y

    def output(self, layer: Factored, x: Any, routing: ops.Routing | None = None) -> Any:
        """Return the output of a layer for the features of `input`, in the layout of the style."""
        factors: list[Any] = [factor.to_local() for factor in layer.factors()]  # type: ignore[attr-defined]
        for index in self.sharding.summed:
            factors[index] = self.summed_gradient(factors[index])
        bias: Any = None if layer.bias is None else layer.bias.to_local()  # type: ignore[attr-defined]

        def product(group: FactorGroup, x: Tensor, bias: Any = None) -> Tensor:
            return ops.linear(group.structure, [factors[i] for i in group.factors], x, bias, routing=routing)

        return (self.split_outputs if self.is_out else self.split_inputs)(product, x, bias)

    def split_outputs(self, product: Any, x: Any, bias: Any) -> Any:
        products: list[Tensor] = []
        for part in self.sharding.parts:
            if part.replicated is None:
                z = self.slice_of(x.to_local(grad_placements=[Partial()]), part)
            else:
                z = self.summed_gradient(product(part.replicated, x.to_local()))
            products.append(product(part.local, z, None if products else bias))
        y = reduce(torch.add, products)
        if self.use_local_output and self.output_layouts == (Shard(-1),):
            return y
        return self.laid_out(self.distributed(y, Shard(-1)))

    def split_inputs(self, product: Any, x: Any, bias: Any) -> Any:
        products: dict[Placement, list[Tensor]] = {Partial(): [], Replicate(): []}
        for part in self.sharding.parts:
            y = self.padded(product(part.local, x.to_local()), part)
            if part.replicated is None:
                products[Partial()].append(y)
            else:
                z = self.distributed(y, Partial()).redistribute(placements=[Replicate()]).to_local()
                products[Replicate()].append(product(part.replicated, z))
        sums = [self.distributed(reduce(torch.add, ys), placement) for placement, ys in products.items() if ys]
        sums = [y.redistribute(placements=self.output_layouts) for y in sums]
        if bias is not None:
            sums.append(self.distributed(bias.to(sums[0].dtype), Replicate()))
        return self.laid_out(reduce(torch.add, sums))

    def laid_out(self, y: Any) -> Any:
        """Return a DTensor in the layout of the style."""
        y = y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y

    def summed_gradient(self, x: Tensor) -> Tensor:
        """Return a tensor that is the same on all devices, and whose gradient will be the sum of theirs."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        summed: Tensor = self.distributed(x, Replicate()).to_local(grad_placements=[Partial()])
        return summed

    def distributed(self, x: Tensor, placement: Placement) -> Any:
        return DTensor.from_local(x, self.mesh, [placement], run_check=False)

    def slice_of(self, x: Tensor, part: Part) -> Tensor:
        """Return the features that a part takes from all."""
        if part.view is None:
            return x
        start, size = self.own_range(part.view)
        x = F.pad(x, (0, part.pads)) if part.pads else x
        y: Tensor = x.unflatten(-1, part.view).narrow(-2, start, size).flatten(-3)
        return y

    def padded(self, y: Tensor, part: Part) -> Tensor:
        """Return all features, with zeros around those of a part."""
        if part.view is None:
            return y
        slower, total, faster = part.view
        start, size = self.own_range(part.view)
        y = F.pad(y.unflatten(-1, (slower, size, faster)), (0, 0, start, total - start - size)).flatten(-3)
        return y[..., : y.shape[-1] - part.pads]

    def own_range(self, view: tuple[int, int, int]) -> tuple[int, int]:
        """Return the first index of this device along the axis of a view, and the number of indices."""
        size = view[1] // self.sharding.devices
        return self.mesh.get_local_rank() * size, size
