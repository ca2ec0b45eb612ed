"""Layers as in the code of arXiv 2406.06248 and 2410.02117, where these differ from the layers of the library."""

from __future__ import annotations

from typing import Any

from einlinear.nn.linear import Factored
from einlinear.nn.moe import MoEFeedForward, MoELinear
from einlinear.structures.families import find_family
from einlinear.structures.spec import is_family, parse_family


def published_arguments(spec: str) -> dict[str, Any]:
    """Return split="published" for a spec of a family that has splits and names none, else nothing.

    >>> published_arguments("btt(rank=2)"), published_arguments("btt(split=balanced)"), published_arguments("dense")
    ({'split': 'published'}, {}, {})
    """
    if not is_family(spec):
        return {}
    name, written = parse_family(spec)
    has_splits = find_family(name).defaults.get("split") == "balanced"
    return {"split": "published"} if has_splits and "split" not in written else {}


class FanInScale(Factored):
    """Mixin: every factor starts with a standard deviation of 1 / sqrt(fan_in), whatever its fan-out."""

    def init_stds(self) -> tuple[float, ...]:
        return tuple(factor.fan_in**-0.5 for factor in self.structure.factors)


class PublishedMoELinear(FanInScale, MoELinear):
    """`MoELinear` as in the code of BTT-MoE (arXiv 2410.02117).

    One RMS and one gamma normalise a factor of all experts together. Its sigma is that of `Linear`, which is less than
    the initial standard deviation if the fan-out is less than the fan-in. Nothing breaks ties: until the router moves,
    all tokens go to the same experts. Different here: the code adds 1e-6 to the gates.
    """

    normalizes_stack = True
    breaks_ties = False


class PublishedMoEFeedForward(MoEFeedForward):
    """`MoEFeedForward` as in the code of arXiv 2410.02117: a random router, and nothing breaks ties."""

    breaks_ties = False
    has_random_router = True
