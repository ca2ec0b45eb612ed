"""Structured products: the reference, backends that must agree with it, and the choice among them."""

from einlinear.ops.backends import BACKENDS, unsupported
from einlinear.ops.context import backend
from einlinear.ops.dispatch import Choice, choose
from einlinear.ops.linear_function import dense_weight, linear
from einlinear.ops.operands import Assignment
from einlinear.ops.projection import project

__all__ = ["BACKENDS", "Assignment", "Choice", "backend", "choose", "dense_weight", "linear", "project", "unsupported"]
