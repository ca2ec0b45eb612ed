"""Tables of embeddings in `compress`: layers with an output for each token, which counts by the token's frequency.

`selection.py` pairs tables with output heads of the same weight, `calibration.py` counts tokens, fits use `fit_metric`
of `output_metric.py`, `sensitivity.py` changes a table with its head, and `pipeline.py` replaces both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn import Linear
from einlinear.nn.dense_layers import is_linear

# modules that hold a parameter, with their names, by its id
Owners = Mapping[int, list[tuple[str, nn.Module]]]


def token_frequencies(counts: Tensor) -> Tensor:
    """Return the frequencies of tokens, (tokens,) in float64 and 1 on average, by how often each occurs in the data.

    Those that do not occur share the frequency of those that occur once (Good and Turing), or what they would have
    if all tokens were alike, if that is less: new text has tokens that the data lack.
    """
    counts = counts.double()
    total, is_new = counts.sum(), counts == 0
    once, new = (counts == 1).double().sum() / total.clamp(min=1), is_new.double().mean()
    share = torch.minimum(once, new) if total > 0 else new
    seen = (1 - share) * counts / total.clamp(min=1)
    return len(counts) * torch.where(is_new, share / is_new.sum().clamp(min=1), seen)


def tied_head(table: nn.Embedding, owners: Owners) -> tuple[str, Any] | None:
    """Return the name and the linear layer that alone has the weight of a table, or None."""
    others = [(name, module) for name, module in owners[id(table.weight)] if module is not table]
    return others[0] if len(others) == 1 and is_linear(others[0][1]) else None


@torch.no_grad()
def structured_head(table: Any, head: Any) -> Linear:
    """Return an output head with the factors of a structured table, and the bias of a dense head."""
    layer: Any = Linear.like(head, table.structure)
    for name, factor in table.named_parameters():
        setattr(layer, name, factor)
    if layer.bias is not None:
        layer.bias.copy_(head.bias)
    return layer.train(head.training)  # type: ignore[no-any-return]
