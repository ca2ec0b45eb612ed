"""Mixtures of experts: routers, layers that compute the routed experts only, and losses."""

from einlinear.nn.moe.experts import Experts
from einlinear.nn.moe.feed_forward import MoEFeedForward
from einlinear.nn.moe.losses import Load, moe_loads, moe_loss
from einlinear.nn.moe.mixture import Mixture, Routing
from einlinear.nn.moe.moe_linear import MoELinear

__all__ = ["Experts", "Load", "Mixture", "MoEFeedForward", "MoELinear", "Routing", "moe_loads", "moe_loss"]
