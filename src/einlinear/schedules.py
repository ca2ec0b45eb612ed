"""Learning-rate schedules: warm-up, then constant, cosine or linear."""

import math

SCHEDULES = ("constant", "cosine", "linear")


def lr_factor(schedule: str, step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Return the learning rate of a step, counted from 0, over its peak."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / (steps - warmup)
    decay = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * decay
