"""Structured layers on one device of several: smaller structures, with communication around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from einlinear import ops
from einlinear.nn import Embedding, Experts, GatedExperts, Linear, MoELinear
from einlinear.nn.linear import Factored
from einlinear.structures.sharding import FactorGroup, Part, Sharding


class ParallelLayer(Factored):
    """A layer on one device of several: its parameters are DTensors of the whole layer."""

    parallel: LayerShare

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.parallel}"


class ParallelLinear(ParallelLayer, Linear):
    """A `Linear` on one device of several."""

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = self.parallel.output(self, self.parallel.input(x))
        return y


class ParallelEmbedding(ParallelLayer, Embedding):
    """An `Embedding` on one device of several, with a slice of the rows or of their features."""

    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.parallel.joined_rows(super().forward(self.parallel.indices(indices)))
        return y

    def lookup(self, indices: Tensor) -> Tensor:
        return self.parallel.rows(self, indices)


class ParallelMoELinear(ParallelLayer, MoELinear):
    """A `MoELinear` on one device of several, with a slice of every expert."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        parallel = self.parallel
        shared = parallel.input(x)
        tokens = shared.redistribute(placements=[Replicate()]).to_local()
        routing = self.route(tokens.reshape(-1, self.in_features))
        gates = parallel.summed_gradient(routing.gates)
        y: Tensor = parallel.output(self, shared, ops.Routing(routing.indices, gates))
        return y


class ParallelExperts(ParallelLayer, Experts):
    """A stack of `GatedExperts` on one device of several: local features in, local features or summands out."""

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        return self.parallel.local_output(self, x, ops.Routing(indices, gates))


class ParallelGatedExperts(GatedExperts):
    """A `GatedExperts` on one device of several, with a slice of the hidden features of every expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        parallel: LayerShare = self.down.parallel  # type: ignore[assignment]
        x, weights = parallel.summed_gradient(hidden_states), parallel.summed_gradient(top_k_weights)
        summand = parallel.distributed(super().forward(x, top_k_index, weights), Partial())
        y: Tensor = summand.redistribute(placements=[Replicate()]).to_local()
        return y


class LayerShare:
    """The share of one device in a layer: how it multiplies, and what it sends to the others and receives.

    Attributes:
        mesh, sharding: the devices, and what each computes.
        placements: of the factors. Those of experts have a first axis of experts.
        is_out: whether output features are split, or the rows of a table, rather than input features.
    """

    def __init__(
        self, style: ColwiseParallel | RowwiseParallel, mesh: DeviceMesh, sharding: Sharding, is_stacked: bool
    ) -> None:
        self.mesh, self.sharding, self.is_out = mesh, sharding, sharding.side == "out"
        pairs = zip(sharding.structure.factors, sharding.axes, strict=True)
        self.placements: list[Placement] = [
            Replicate() if axis is None else Shard(is_stacked + factor.axes.index(axis)) for factor, axis in pairs
        ]
        self.input_layouts, self.output_layouts = style.input_layouts, style.output_layouts
        self.use_local_output = style.use_local_output
        self.style = type(style).__name__.lower()

    def __str__(self) -> str:
        return f"{self.style} over {self.sharding.devices} devices"

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
        """Return the output of a layer for the features of `input`, as `output_layouts` say."""
        bias: Any = None if layer.bias is None else layer.bias.to_local()  # type: ignore[attr-defined]
        return (self.split_outputs if self.is_out else self.split_inputs)(self.product(layer, routing), x, bias)

    def local_output(self, layer: Factored, x: Tensor, routing: ops.Routing) -> Tensor:
        """Return the output features of this device, or its summand of all, for features that it has already."""
        product, parts = self.product(layer, routing), self.sharding.parts
        if self.is_out:
            return reduce(torch.add, [product(part.local, self.slice_of(x, part)) for part in parts])
        return reduce(torch.add, [self.padded(product(part.local, x), part) for part in parts])

    def product(self, layer: Factored, routing: ops.Routing | None = None) -> Callable[..., Tensor]:
        """Return the function that multiplies features with a group of factors on this device."""
        factors = self.factors(layer)

        def product(group: FactorGroup, x: Tensor, bias: Any = None) -> Tensor:
            return ops.linear(group.structure, [factors[i] for i in group.factors], x, bias, routing=routing)

        return product

    def factors(self, layer: Factored) -> list[Tensor]:
        """Return the factors on this device, with their gradients summed over devices where slices are applied."""
        factors = list[Tensor]()
        for factor, placement in zip(layer.factors(), self.placements, strict=True):
            shared: Any = factor
            # the layer shares it with one that is not parallel
            if not isinstance(factor, DTensor):
                shared = self.distributed(factor, Replicate()).redistribute(placements=[placement])
            factors.append(shared.to_local())
        for index in self.sharding.summed:
            factors[index] = self.summed_gradient(factors[index])
        return factors

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

    def indices(self, indices: Tensor) -> Tensor:
        """Return the indices of a table's rows that all devices look up together."""
        y: Any = indices if isinstance(indices, DTensor) else self.distributed(indices, *self.input_layouts)
        whole: Tensor = y.redistribute(placements=[Replicate()]).to_local()
        return whole

    def rows(self, layer: Factored, indices: Tensor) -> Tensor:
        """Return rows of a table by their indices (n,): zeros for those of other devices, or features of this one."""
        factors, rows = self.factors(layer), list[Tensor]()
        for part in self.sharding.parts:
            local, mask = indices, None
            view = (1, self.sharding.structure.out_features, 1) if self.is_out else part.view
            if view is not None:
                local, mask = self.local_indices(indices, view)
            y = ops.rows(part.local.structure, [factors[i] for i in part.local.factors], local)
            y = y if mask is None else y.masked_fill(~mask[:, None], 0)
            rows.append(self.padded(y, part) if self.is_out else y)
        return reduce(torch.add, rows)

    def joined_rows(self, rows: Tensor) -> Any:
        """Return the rows that all devices looked up, as `output_layouts` say."""
        return self.laid_out(self.distributed(rows, Partial() if self.is_out else Shard(-1)))

    def laid_out(self, y: Any) -> Any:
        """Return a DTensor, or its local part, as `output_layouts` and `use_local_output` say."""
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
        start, size = self.local_range(part.view)
        x = F.pad(x, (0, part.pads)) if part.pads else x
        y: Tensor = x.unflatten(-1, part.view).narrow(-2, start, size).flatten(-3)
        return y

    def padded(self, y: Tensor, part: Part) -> Tensor:
        """Return all features, with zeros around those of a part."""
        if part.view is None:
            return y
        slower, total, faster = part.view
        start, size = self.local_range(part.view)
        y = F.pad(y.unflatten(-1, (slower, size, faster)), (0, 0, start, total - start - size)).flatten(-3)
        return y[..., : y.shape[-1] - part.pads]

    def local_indices(self, indices: Tensor, view: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return indices of the view's slice on this device, and which are in it; the others are replaced."""
        _, total, faster = view
        start, size = self.local_range(view)
        slow, rest = indices // (total * faster), indices % (total * faster)
        middle = rest // faster - start
        local = (slow * size + middle.clamp(0, size - 1)) * faster + rest % faster
        return local, (middle >= 0) & (middle < size)

    def local_range(self, view: tuple[int, int, int]) -> tuple[int, int]:
        """Return the first index of this device along the axis of a view, and the number of indices."""
        size = view[1] // self.sharding.devices
        return self.mesh.get_local_rank() * size, size
