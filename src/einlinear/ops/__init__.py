"""How a structured product is run: a reference, backends that must agree with it, and the choice among them.

reference.py     plain einsum, and the dense W
bmm/             an backend: batched matmuls
tiles/           an backend: a compiled kernel for the CPU
triton_kernels/  an backend: kernels for GPUs
operands.py      the check of what is multiplied, before any of them runs
backends.py     what they have in common, and which there are
costs.py         what they cost on a CPU
dispatch.py      which one runs
autograd.py      how torch sees them
linear.py        `linear`: all of it, called as torch.nn.functional.linear is
projection/      the other way: from a dense W to factors
"""

from einlinear.ops.backends import BACKENDS, unsupported
from einlinear.ops.dispatch import Choice, backend, choose
from einlinear.ops.functional import dense_weight, linear
from einlinear.ops.projection import project
from einlinear.ops.routed import grouped_linear

__all__ = [
    "BACKENDS",
    "Choice",
    "backend",
    "choose",
    "dense_weight",
    "grouped_linear",
    "linear",
    "project",
    "unsupported",
]
