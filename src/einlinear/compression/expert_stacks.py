"""Experts of transformers as layers that the pipeline of `compress` measures: one for each stack of matrices.

While a model is compressed, its experts modules are `GatedExperts` whose stacks are dense. All experts of a stack get
one structure. Its errors are sums over experts, weighted by the numbers of tokens that the router sends to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.experts import experts_modules, reason_to_skip_experts
from einlinear.conversion.replacement import replace_modules
from einlinear.nn import Experts, GatedExperts
from einlinear.nn.dense_layers import weight_matrix
from einlinear.nn.moe.gated_experts import active_experts, dense_stacks, without_parameters
from einlinear.nn.names import plain_modules

NOT_OPENED = "is compressed with count='params' or 'macs' only, without only_if_faster and 'narrow'"


def are_opened(count: str, families: Sequence[str], only_if_faster: bool) -> bool:
    """Return whether stacks are compressed with these options of `compress`; else they stay, as `NOT_OPENED` says."""
    return count in ("params", "macs") and not only_if_faster and not any(f.startswith("narrow") for f in families)


class DenseStack(nn.Module):
    """The matrices of all experts, (experts, out_features, in_features), in the place of `Experts`."""

    bias = None

    def __init__(self, weight: Tensor, active: int, requires_grad: bool) -> None:
        super().__init__()
        # a view of the model's own
        self.weight = nn.Parameter(weight.detach(), requires_grad)
        self.experts, self.out_features, self.in_features = weight.shape
        self.active = active
        # called with the tokens of one expert each, so that these can be observed
        self.inputs = nn.ModuleList(nn.Identity() for _ in range(self.experts))
        # of the last call
        self.indices = torch.zeros(0, dtype=torch.int64)

    def forward(self, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        self.indices = indices[:, 0]
        return self.multiply(x, self.weight) * gates

    def multiply(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the products of tokens (n, in_features), routed as in the last call, with other weights."""
        order = self.indices.argsort(stable=True)
        by_expert = x[order].split(torch.bincount(self.indices, minlength=self.experts).tolist())
        outputs = [read(tokens) @ w.T for read, tokens, w in zip(self.inputs, by_expert, weights, strict=True)]
        return torch.cat(outputs)[order.argsort()]

    def structured(self, spec: str) -> Experts:
        """Return new experts of a structure in the place of these."""
        config: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        size = self.in_features, self.out_features, spec, self.experts, self.active
        return Experts(*size, bias=False, **config).requires_grad_(self.weight.requires_grad).train(self.training)


@contextmanager
def open_experts(model: nn.Module, is_enabled: bool) -> Iterator[None]:
    """Make the stacks of a model's experts layers; those of which none becomes structured come back in the end."""
    modules = experts_modules(model) if is_enabled else {}
    dense = {id(m): m for m in modules.values() if reason_to_skip_experts(m) is None}
    opened = {key: _open(module) for key, module in dense.items()}
    replace_modules(model, opened)
    try:
        yield
    finally:
        closed: dict[int, nn.Module] = {}
        for key, layer in opened.items():
            layer.train(dense[key].training)
            left = {name: s for name, s in layer.named_children() if isinstance(s, DenseStack)}
            if len(left) == len(layer.stacks()):
                closed[id(layer)] = dense[key]
            for name, stack in left.items():
                experts = stack.structured("dense")
                experts.project(stack.weight)
                setattr(layer, name, experts)
        replace_modules(model, closed)


def _open(dense: Any) -> GatedExperts:
    experts, in_features, hidden_features = dense.down_proj.shape
    active, dtype = active_experts(dense), dense.down_proj.dtype
    size = in_features, hidden_features, "dense", dense.act_fn, experts, active
    layer = GatedExperts(*size, device="meta", dtype=dtype)
    layer.__dict__["dense"] = without_parameters(dense)
    learns = {"down": dense.down_proj.requires_grad}
    for name, weight in dense_stacks(dense).items():
        stack: Any = DenseStack(weight, active, learns.get(name, dense.gate_up_proj.requires_grad))
        setattr(layer, name, stack)
    return layer.train(dense.training)


def stacks_of(model: nn.Module) -> dict[str, DenseStack]:
    """Return the stacks of a model whose experts are open, by name."""
    return {name: module for name, module in plain_modules(model, True) if isinstance(module, DenseStack)}


def layer_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer or table, (out_features, in_features), or of a stack, (experts, out, in)."""
    weight: Tensor = layer.weight if isinstance(layer, DenseStack | nn.Embedding) else weight_matrix(layer)
    return weight


def matrices(layer: Any, count: str) -> int:
    """Return how many matrices of a layer count: all of a stack for parameters, and the active ones for MACs."""
    if not isinstance(layer, DenseStack):
        return 1
    return layer.active if count == "macs" else layer.experts
