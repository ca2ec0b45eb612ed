"""LoRA beside the dense linear layers of a model while it is distilled, merged into their weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.adapters.adapted_linear import Adapter
from einlinear.adapters.merging import merged_weight
from einlinear.compression.activations import hooked
from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.replacement import linear_layers, owners_of
from einlinear.nn.dense_layers import features


@contextmanager
def temporary_lora(model: nn.Module, rank: int) -> Iterator[dict[str, Adapter]]:
    """Yield an adapter of this rank, zero at first, for each dense layer by name, and merge them at the end.

    Modules keep their names (unlike with `einlinear.adapt`), as distillation matches those of two models. Layers with
    frozen or tied weights, and those that compute more than a product, get none.

    Raises:
        ValueError: at the end, a sum that is not finite; that weight then stays as it was.
    """
    adapters, owners = dict[str, Adapter](), owners_of(model)
    layers = {n: layer for n, layer in linear_layers(model).items() if reason_to_skip(layer) is None}
    # the same numbers in every call, drawn on the CPU, and none of the user's
    with torch.random.fork_rng(()):
        torch.default_generator.manual_seed(0)
        for name, layer in layers.items():
            if layer.weight.requires_grad and len(owners[id(layer.weight)]) == 1:
                size, weight = features(layer), layer.weight
                adapter = Adapter(*size, f"low_rank(rank={min(rank, *size)})", device="cpu", dtype=weight.dtype)
                adapters[name] = adapter.to(weight.device)

    def add(name: str, x: Any, output: Tensor) -> Tensor:
        product: Tensor = adapters[name](x)
        return output + product

    try:
        with hooked({name: layers[name] for name in adapters}, add):
            yield adapters
    finally:
        with torch.no_grad():
            for name, adapter in adapters.items():
                if (total := merged_weight(layers[name], [adapter.dense_weight()])) is None:
                    raise ValueError(f"{name}: the sum of weight and adapter has entries that are not finite")
                layers[name].weight.copy_(total)
