"""Speed of language models: reading a prompt (prefill) and generating tokens one by one (decode)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from einlinear.compression.compression_report import seconds_of


@dataclass(frozen=True)
class ModelSpeed:
    """Medians, in tokens per second. `decode` is None for a model that does not generate."""

    prefill: float
    decode: float | None


@torch.no_grad()
def model_speeds(
    models: Mapping[str, Any], tokens: int = 256, new_tokens: int = 16, rounds: int = 5
) -> dict[str, ModelSpeed]:
    """Time models of transformers in turns.

    Args:
        models: by name, all on one device.
        tokens: length of the prompt; shorter if a model's context is.
        new_tokens: tokens to generate, with a cache.
        rounds: of all models.
    """
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    # the first round warms up
    for _ in range(rounds + 1):
        for name, model in models.items():
            longest = getattr(model.config, "max_position_embeddings", None) or tokens + new_tokens
            tokens = min(tokens, longest - new_tokens)
            ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
            ids = ids.to(model.device)
            prefill = seconds_of(partial(model, input_ids=ids), ids.device)
            prefills[name].append(tokens / prefill)
            if model.can_generate():
                # past any end of the text
                count = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
                mask = torch.ones_like(ids)
                generate = partial(model.generate, ids, attention_mask=mask, do_sample=False, **count)
                both = seconds_of(generate, ids.device)
                decodes[name].append((new_tokens - 1) / max(both - prefill, 1e-9))
    return {
        name: ModelSpeed(
            statistics.median(prefills[name][1:]), statistics.median(decodes[name][1:]) if decodes[name] else None
        )
        for name in models
    }
