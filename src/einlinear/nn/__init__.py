"""torch modules: the structured linear layer, and feed-forward blocks and mixtures of experts made of it."""

from einlinear.nn.convolution import Conv1d, Conv2d
from einlinear.nn.embedding import Embedding
from einlinear.nn.feed_forward import FeedForward
from einlinear.nn.linear import Linear
from einlinear.nn.moe import Experts, GatedExperts, Load, MoEFeedForward, MoELinear, RouterOutput, moe_loads, moe_loss
from einlinear.nn.quantized_linear import QuantizedLinear

__all__ = [
    "Conv1d",
    "Conv2d",
    "Embedding",
    "Experts",
    "FeedForward",
    "GatedExperts",
    "Linear",
    "Load",
    "MoEFeedForward",
]
__all__ += ["MoELinear", "QuantizedLinear", "RouterOutput", "moe_loads", "moe_loss"]
