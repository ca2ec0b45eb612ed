"""Mixtures of experts: routers, layers that compute the routed experts only, and losses."""

from einlinear.nn.moe.gated_experts import GatedExperts
from einlinear.nn.moe.mixture import (
    Experts,
    Load,
    Mixture,
    MoEFeedForward,
    MoELinear,
    RouterOutput,
    moe_loads,
    moe_loss,
)

__all__ = [
    "Experts",
    "GatedExperts",
    "Load",
    "Mixture",
    "MoEFeedForward",
    "MoELinear",
    "RouterOutput",
    "moe_loads",
    "moe_loss",
]
