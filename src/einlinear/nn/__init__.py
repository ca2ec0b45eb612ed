"""torch modules: the structured linear layer, and feed-forward blocks and mixtures of experts made of it."""

from einlinear.nn.convolution import Conv1d, Conv2d
from einlinear.nn.embedding import Embedding
from einlinear.nn.feed_forward import FeedForward
from einlinear.nn.linear import Linear
from einlinear.nn.moe import Experts, Load, MoEFeedForward, MoELinear, RouterOutput, moe_loads, moe_loss
from einlinear.nn.quantized_linear import QuantizedLinear

__all__ = ["Conv1d", "Conv2d", "Embedding", "Experts", "FeedForward", "Linear", "Load", "MoEFeedForward", "MoELinear"]
__all__ += ["QuantizedLinear", "RouterOutput", "moe_loads", "moe_loss"]
