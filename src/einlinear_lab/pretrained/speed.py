"""How fast compressed layers and models run beside the original ones, timed in turns so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.nn.third_party import features

MANY = 256  # tokens at once
_LEAST, _MOST, _ENOUGH = 6, 60, 0.1  # calls of each layer, and seconds of both after which no more are needed
_NOISE = 0.95  # of the dense layer's speed


@dataclass(frozen=True)
class Speed:
    """Medians, in tokens per second. `decode` is None of a model that generates nothing."""

    prefill: float
    decode: float | None


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast a new layer is as an old one, for one token and for `MANY` at once."""

    one: float = 1.0
    many: float = 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the new layer is slower, by more than timing is off, for one token or for many."""
        return min(self.one, self.many) < _NOISE


@torch.no_grad()
def speed_up(old: nn.Module, new: nn.Module) -> SpeedUp:
    """How many times as fast a new layer is as an old one, forward; both have a parameter of any dtype and device."""
    like = next(new.parameters())
    x = torch.randn(MANY, features(old)[0], generator=torch.Generator().manual_seed(0)).to(like)
    return SpeedUp(*(_speed_up(partial(old, part), partial(new, part), like.device) for part in (x[:1], x)))


def _speed_up(old: Callable[[], object], new: Callable[[], object], device: torch.device) -> float:
    """Of calls in turns, the shortest of each."""
    found: tuple[list[float], list[float]] = ([], [])
    while len(found[0]) < _LEAST or (len(found[0]) < _MOST and sum(map(sum, found)) < _ENOUGH):
        for run, own in zip((old, new), found, strict=True):
            own.append(_seconds(run, device))
    return min(found[0]) / min(found[1])


@torch.no_grad()
def speeds(models: Mapping[str, Any], tokens: int = 256, new_tokens: int = 16, rounds: int = 5) -> dict[str, Speed]:
    """Tokens per second of models of transformers.

    Args:
        models: of transformers, by name, all on one device.
        tokens: of the one sequence that they read at once (prefill), and before those they generate; fewer if they
            cannot read so many.
        new_tokens: that they generate one by one, with a cache (decode).
        rounds: of all models.
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            longest = getattr(model.config, "max_position_embeddings", None) or tokens + new_tokens
            tokens = min(tokens, longest - new_tokens)
            ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
            ids = ids.to(model.device)
            read = _seconds(partial(model, input_ids=ids), ids.device)
            found[name][0].append(tokens / read)
            if model.can_generate():
                both = _seconds(partial(_generate, model, ids, new_tokens), ids.device)
                found[name][1].append((new_tokens - 1) / max(both - read, 1e-9))
    return {
        name: Speed(statistics.median(read[1:]), statistics.median(written[1:]) if written else None)
        for name, (read, written) in found.items()
    }


def _generate(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    """Greedily, and no fewer: the end of the text is a token as any other."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
