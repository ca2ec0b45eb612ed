"""How a structured product is run: a reference, executors that must agree with it, and the choice among them.

reference.py     plain einsum, and the dense W
bmm/             an executor: batched matmuls
tiles/           an executor: a compiled kernel for the CPU
triton_kernels/  an executor: kernels for GPUs
operands.py      the check of what is multiplied, before any of them runs
executors.py     what they have in common, and which there are
costs.py         what they cost on a CPU
dispatch.py      which one runs
autograd.py      how torch sees them
linear.py        `linear`: all of it, called as torch.nn.functional.linear is
projection/      the other way: from a dense W to factors
"""

from einlinear.ops.dispatch import Choice, backend, choose
from einlinear.ops.executors import EXECUTORS, unsupported
from einlinear.ops.grouped import grouped_linear
from einlinear.ops.linear import dense_weight, linear
from einlinear.ops.projection import project

__all__ = [
    "EXECUTORS",
    "Choice",
    "backend",
    "choose",
    "dense_weight",
    "grouped_linear",
    "linear",
    "project",
    "unsupported",
]
