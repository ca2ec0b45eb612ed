"""Learning-rate schedules: one factor per step multiplies the rate of every group, so their ratios stay."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear")


def lr_factor(schedule: str, step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Return the learning rate of a step, counted from 0, over its peak.

    The factor rises linearly over the warm-up, whose last step has the peak, and falls to `final` at the end.

    >>> [lr_factor("linear", step, 6, warmup=2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / (steps - warmup)
    decay = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * decay
