"""Speed of language models: reading a prompt (prefill) and generating tokens one by one (decode)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from einlinear_lab.bench.timing import interleave


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
    prefills: dict[str, Callable[[], object]] = {}
    generations: dict[str, Callable[[], object]] = {}
    contexts = (getattr(model.config, "max_position_embeddings", None) for model in models.values())
    tokens = min(tokens, *(context - new_tokens for context in contexts if context), tokens)
    for name, model in models.items():
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        prefills[f"{name}, prefill"] = partial(model, input_ids=ids)
        if model.can_generate():
            # Past any end of the text.
            count = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
            generate = partial(model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, **count)
            generations[f"{name}, generation"] = generate
    calls = prefills | generations
    for call in calls.values():
        call()
    device = next(iter(models.values())).device.type
    times = interleave(calls, device, rounds=rounds)
    speeds = {}
    for name in models:
        prefill, decode = times[f"{name}, prefill"], None
        if generation := times.get(f"{name}, generation"):
            rest = [max(whole - first, 1e-9) for whole, first in zip(generation, prefill, strict=True)]
            decode = median((new_tokens - 1) / seconds for seconds in rest)
        speeds[name] = ModelSpeed(tokens / median(prefill), decode)
    return speeds
