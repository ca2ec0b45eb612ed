"""torch modules: the structured linear layer, and mixtures of experts made of it."""

from einlinear.nn.linear import Linear
from einlinear.nn.moe import Experts, Load, MoEFeedForward, MoELinear, Routing, moe_loads, moe_loss

__all__ = ["Experts", "Linear", "Load", "MoEFeedForward", "MoELinear", "Routing", "moe_loads", "moe_loss"]
