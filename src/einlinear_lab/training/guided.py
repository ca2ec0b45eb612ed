"""Self-guided training (Wei et al., arXiv 2406.16450): a dense guide beside every structured weight.

The guide starts as the same matrix and computes the output at first; its share of the output falls to 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.nn.layer_descriptions import LayerInfo, ParameterRole
from einlinear.nn.linear import Linear
from einlinear.nn.moe import Mixture
from einlinear.structures import structure as make_structure


class Guided(Linear):
    """y = (1 - share) * (x W^T) + share * (x guide^T) + bias, with a structured W and a dense guide.

    `guide` turns a `Linear` into a `Guided` in place; its parameters, names and hooks stay.

    Attributes:
        guide: (out_features, in_features), a parameter.
        share: of the guide in the output, from 1 to 0; not in the state_dict, since it follows from the step.
    """

    guide: nn.Parameter
    # Not a number, as torch.compile would recompile for every one.
    share: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.share) * super().forward(x) + self.share * F.linear(x, self.guide, self.bias)

    def dense_weight(self) -> Tensor:
        return (1 - self.share) * super().dense_weight() + self.share * self.guide

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.guide.copy_(super().dense_weight())

    def layer_info(self) -> LayerInfo:
        # The guide is a matrix of the structure "dense", so that its base is the weight W has there.
        info, dense = super().layer_info(), make_structure("dense", self.in_features, self.out_features)
        roles = {**info.roles, "guide": ParameterRole("hidden", self.in_features, self.out_features, dense)}
        return replace(info, roles=roles, macs=self.structure.macs + dense.macs)


@torch.no_grad()
def guide(model: nn.Module) -> None:
    """Add a guide to every structured layer, in place; the outputs of the model stay the same.

    Guides are parameters: make the optimizer, and wrap the model, afterwards. Layers of the structure "dense" get no
    guide; layers that share all factors share their guide. A guide is frozen if all factors are frozen.

    Raises:
        ValueError: the model has no `Linear`, a mixture of experts, or a subclass of `Linear`. It is then unchanged.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.training.guided import guide, set_share, unguide
        >>> model = torch.nn.Sequential(el.Linear(64, 64, "btt"), torch.nn.ReLU())
        >>> guide(model)
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('0.A', (8, 1, 8, 8)), ('0.B', (8, 8, 8, 1)), ('0.bias', (64,)), ('0.guide', (64, 64))]
        >>> set_share(model, 0.5)  # less with every step
        >>> unguide(model)
        >>> model[0]
        Linear(in_features=64, out_features=64, structure='btt', bias=True, params=1024, macs=1024 (25.0% of dense))
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if not layers:
        raise ValueError("there is no structured layer in the model that a guide could be given to")
    for name, module in model.named_modules():
        has_guide = name in layers and layers[name].structure.spec != "dense"
        if isinstance(module, Mixture) or (has_guide and type(module) is not Linear):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}: guides are for layers that are an el.Linear"
            )
    guides: dict[tuple[int, ...], nn.Parameter] = {}
    for layer in layers.values():
        if layer.structure.spec == "dense":
            continue
        factors = layer.weight_parameters()
        weight = layer.dense_weight().clone(memory_format=torch.contiguous_format)
        dense = nn.Parameter(weight, any(p.requires_grad for p in factors))
        share = torch.ones((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        # A new module would lose its hooks, and other references would keep the old one.
        layer.__class__ = Guided
        layer.register_parameter("guide", guides.setdefault(tuple(map(id, factors)), dense))
        layer.register_buffer("share", share, persistent=False)


def set_share(model: nn.Module, share: float) -> None:
    """Set the guides' share of every output: 1 at first, 0 before `unguide`."""
    for layer in _guided(model):
        layer.share.fill_(share)


def unguide(model: nn.Module) -> None:
    """Remove all guides, in place, whatever their share: the layers become what they were before `guide`."""
    for layer in _guided(model):
        del layer.guide, layer.share
        layer.__class__ = Linear


def _guided(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Guided)]
