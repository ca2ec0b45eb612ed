"""Structured products: the reference, backends that must agree with it, and the choice among them."""

from einlinear.ops.activation_functions import ACTIVATIONS
from einlinear.ops.backends import BACKENDS, reason_unsupported
from einlinear.ops.context import backend
from einlinear.ops.dispatch import Choice, choose
from einlinear.ops.feed_forward_function import feed_forward
from einlinear.ops.fused_dispatch import reason_not_to_fuse, reason_not_to_stack
from einlinear.ops.linear_function import dense_weight, linear
from einlinear.ops.operands import Routing, Weights
from einlinear.ops.projection import project
from einlinear.ops.row_lookup import rows
from einlinear.ops.shared_input import shared_input_linear

__all__ = ["BACKENDS", "Choice", "Routing", "backend", "choose", "dense_weight", "linear", "project", "rows"]
__all__ += ["reason_unsupported"]
# feed-forward blocks
__all__ += ["ACTIVATIONS", "Weights", "feed_forward", "reason_not_to_fuse"]
# several layers of one input
__all__ += ["reason_not_to_stack", "shared_input_linear"]
