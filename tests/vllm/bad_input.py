"""Print, as JSON, what the plugin of vLLM says about layers that it cannot load."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from einlinear.integrations.vllm import StructuredLayersConfig, StructuredLinearMethod

ENTRY = {"structure": "low_rank(rank=4)", "in_features": 16, "out_features": 32, "bias": False}


def made(method: StructuredLinearMethod, sizes: list[int], devices: int = 1) -> nn.Module:
    layer: Any = nn.Module()
    layer.tp_size = devices
    method.create_weights(layer, 16, sizes, 16, sum(sizes), torch.float32)
    return layer


def load(key: str, tensor: torch.Tensor, part: int | None = 0) -> None:
    layer = made(StructuredLinearMethod({"gate": ENTRY, "up": None}), [32, 32])
    placeholder: Any = layer.get_parameter(key)
    placeholder.weight_loader(placeholder, tensor, part)


CASES: dict[str, Callable[[], object]] = {
    "devices": lambda: made(StructuredLinearMethod({"down": ENTRY}), [32], devices=2),
    "sizes": lambda: made(StructuredLinearMethod({"down": ENTRY}), [48]),
    "shape": lambda: load("A", torch.zeros(3, 16)),
    "dense weight": lambda: load("weight", torch.zeros(32, 16)),
    "embedding": lambda: StructuredLayersConfig.from_config(
        {"version": 1, "layers": {"wte": {**ENTRY, "embedding": True}}}
    ),
    "entry": lambda: StructuredLayersConfig.from_config({"version": 1, "layers": {"down": {"structure": "low_rank"}}}),
}


def message(case: Callable[[], object]) -> str:
    try:
        case()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    # empty tensors stand for dense weights that are not there
    load("weight", torch.zeros(0))
    load("weight", torch.zeros(32, 16), 1)
    print(json.dumps({name: message(case) for name, case in CASES.items()}))
