"""Low-rank additions (LoRA) to the dense linear layers of a model, merged into their weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.activations import hooked
from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.replacement import linear_layers, owners_of
from einlinear.nn import Linear
from einlinear.nn.dense_layers import features, weight_matrix


@contextmanager
def low_rank_additions(model: nn.Module, rank: int) -> Iterator[dict[str, Linear]]:
    """Yield a product of this rank, zero at first, for each dense layer by name, and add it to the weight at the end.

    Until then it is added to the layer's outputs (Hu et al., arXiv 2106.09685). Layers with frozen or tied weights, and
    those that compute more than a product, get none.
    """
    additions, owners = dict[str, Linear](), owners_of(model)
    layers = {n: layer for n, layer in linear_layers(model).items() if reason_to_skip(layer) is None}
    for name, layer in layers.items():
        if layer.weight.requires_grad and len(owners[id(layer.weight)]) == 1:
            size, place = features(layer), {"device": layer.weight.device, "dtype": layer.weight.dtype}
            additions[name] = Linear(*size, f"low_rank(rank={min(rank, *size)})", bias=False, **place)
            nn.init.zeros_([*additions[name].parameters()][-1])

    def add(name: str, x: Any, output: Tensor) -> Tensor:
        product: Tensor = additions[name](x)
        return output + product

    try:
        with hooked({name: layers[name] for name in additions}, add):
            yield additions
    finally:
        with torch.no_grad():
            for name, addition in additions.items():
                weight = weight_matrix(layers[name])
                weight += addition.dense_weight()
