"""torch modules: the structured linear layer, mixtures of it, and in `models` the reference models built from them."""

from einlinear.nn.linear import Linear
from einlinear.nn.models import GPT, ReferenceModel, ResidualMLP, ViT
from einlinear.nn.moe import Experts, Load, MoEFeedForward, MoELinear, Routing, moe_loads, moe_loss

__all__ = [
    "GPT",
    "Experts",
    "Linear",
    "Load",
    "MoEFeedForward",
    "MoELinear",
    "ReferenceModel",
    "ResidualMLP",
    "Routing",
    "ViT",
    "moe_loads",
    "moe_loss",
]
