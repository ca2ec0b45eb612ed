"""Speed of language models: reading a prompt (prefill) and generating tokens one by one (decode)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from einlinear.compression.layer_timing import seconds_of


@dataclass(frozen=True)
class ModelSpeed:
    """Medians, in tokens per second. `decode` is None for a model that does not generate."""

    prefill: float
    decode: float | None


@torch.no_grad()
def model_speeds(
    models: Mapping[str, Any], tokens: int = 256, new_tokens: int = 16, rounds: int = 5
) -> dict[str, ModelSpeed]:
    """Time models of transformers in turns, with a prompt of `tokens`, or fewer if a model's context is shorter."""
    speeds: dict[str, list[ModelSpeed]] = {name: [] for name in models}
    # The first round warms up.
    for _ in range(rounds + 1):
        for name, model in models.items():
            longest = getattr(model.config, "max_position_embeddings", None) or tokens + new_tokens
            tokens = min(tokens, longest - new_tokens)
            ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
            ids = ids.to(model.device)
            prefill, decode = seconds_of(partial(model, input_ids=ids), ids.device), None
            if model.can_generate():
                # Past any end of the text.
                count = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
                mask = torch.ones_like(ids)
                generate = partial(model.generate, ids, attention_mask=mask, do_sample=False, **count)
                decode = (new_tokens - 1) / max(seconds_of(generate, ids.device) - prefill, 1e-9)
            speeds[name].append(ModelSpeed(tokens / prefill, decode))
    return {name: _median(measured[1:]) for name, measured in speeds.items()}


def _median(speeds: list[ModelSpeed]) -> ModelSpeed:
    decodes = [speed.decode for speed in speeds if speed.decode is not None]
    prefill = statistics.median(speed.prefill for speed in speeds)
    return ModelSpeed(prefill, statistics.median(decodes) if decodes else None)
