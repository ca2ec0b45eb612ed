"""How a structured product is run: a reference, executors that must agree with it, and the choice among them."""

from einlinear.ops.dispatch import EXECUTORS, Choice, backend, choose, explain, unsupported
from einlinear.ops.functional import linear
from einlinear.ops.projection import project
from einlinear.ops.reference import dense_weight

__all__ = ["EXECUTORS", "Choice", "backend", "choose", "dense_weight", "explain", "linear", "project", "unsupported"]
