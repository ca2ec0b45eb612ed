"""torch modules: the structured linear layer, and feed-forward blocks and mixtures of experts made of it."""

from einlinear.nn.embedding import Embedding
from einlinear.nn.feed_forward import FeedForward
from einlinear.nn.linear import Linear
from einlinear.nn.moe import Experts, Load, MoEFeedForward, MoELinear, RouterOutput, moe_loads, moe_loss
from einlinear.nn.quantized_linear import QuantizedLinear

__all__ = [
    "Embedding",
    "Experts",
    "FeedForward",
    "Linear",
    "Load",
    "MoEFeedForward",
    "MoELinear",
    "QuantizedLinear",
    "RouterOutput",
]
__all__ += ["moe_loads", "moe_loss"]
