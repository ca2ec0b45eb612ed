"""Mixtures of experts: which experts a token goes to, layers that compute with those alone, and their losses."""

from einlinear.nn.moe.gate import Gate, Routing
from einlinear.nn.moe.linear import MoELinear
from einlinear.nn.moe.losses import Load, moe_loads, moe_loss

__all__ = ["Gate", "Load", "MoELinear", "Routing", "moe_loads", "moe_loss"]
