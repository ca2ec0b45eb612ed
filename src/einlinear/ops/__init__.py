"""Structured products: a reference, backends that must agree with it, and the choice among them.

product.py     the operands of a product, and its gradients
reference.py   plain einsum, and the dense W
batched/       a backend: batched matmuls
cpu/           a backend: a compiled kernel for the CPU
triton/        a backend: kernels for GPUs
operands.py    the check of operands before any backend runs
backends.py    the interface and the registry of backends
context.py     who looks at a call, and what a user forces
costs.py       the cost model of backends on a CPU
dispatch.py    the backend that runs, and why
autograd.py    the derivatives: autograd function and operators
functional.py  `linear`, the counterpart of torch.nn.functional.linear
projection/    from a dense W to factors
"""

from einlinear.ops.backends import BACKENDS, unsupported
from einlinear.ops.context import backend
from einlinear.ops.dispatch import Choice, choose
from einlinear.ops.functional import dense_weight, linear
from einlinear.ops.product import Assignment
from einlinear.ops.projection import project

__all__ = [
    "BACKENDS",
    "Assignment",
    "Choice",
    "backend",
    "choose",
    "dense_weight",
    "linear",
    "project",
    "unsupported",
]
