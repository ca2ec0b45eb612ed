"""Feed-forward blocks in the Triton kernels: a chunk of tokens passes through all layers while it is in the L2 cache.

Experimental: not measured on a GPU yet. The last launch that writes hidden features applies the activation and the
product with the gate, and the last launch of `down` adds x. The backward pass computes hidden features again from x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops.activation_functions import ACTIVATIONS
from einlinear.ops.feed_forward_structure import FeedForwardStructure
from einlinear.ops.operands import Operands
from einlinear.ops.triton.launch import NO_EPILOGUE, Epilogue
from einlinear.ops.triton.triton_backend import compute, gradients

# bytes of the hidden features of a chunk: twice as many, which a launch reads and writes, fit in the L2 cache of an
# A100 (40 MB), H100 or H200 (50 MB) with the weights; smaller chunks need more launches
CHUNK_BYTES = 2**24
# the fewest tokens of a chunk: tiles have up to 128
_MIN_TOKENS = 128

_aten = torch.ops.aten
# the gradient of z, given that of activation(z), and z
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, z: grad,
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "relu_squared": lambda grad, z: grad * (2 * F.relu(z)),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    # quick_gelu(z) = silu(1.702 z) / 1.702
    "quick_gelu": lambda grad, z: _aten.silu_backward(grad, 1.702 * z),
    "silu": _aten.silu_backward,
    "sigmoid": lambda grad, z: _aten.sigmoid_backward(grad, torch.sigmoid(z)),
    "tanh": lambda grad, z: _aten.tanh_backward(grad, torch.tanh(z)),
}


def forward(block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return y of shape (n, out_features)."""
    tensors = [tensor.contiguous() for tensor in tensors]
    y = x.new_empty(x.shape[0], block.features[-1])
    for chunk in _chunks(block, x):
        up, *gate, down = _layer_operands(block, x[chunk], tensors)
        multiplier = compute(up, Epilogue(up.bias))[0] if gate else None
        activated = gate[0] if gate else up
        hidden = compute(activated, Epilogue(activated.bias, None, block.activation, multiplier))[0]
        compute(down._replace(x=hidden), Epilogue(down.bias, x[chunk] if block.residual else None, out=y[chunk]))
    return y


def backward(
    block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients that are needed, of x and of the tensors, given that of y.

    Those of the tensors are sums over the chunks in float32.
    """
    tensors = [tensor.contiguous() for tensor in tensors]
    needs_x, *others = needed
    *needs_first, needs_down = block.split(others)
    needs_hidden = needs_x or any(any(factors) or bias for factors, bias in needs_first)
    grad_x = x.new_empty(x.shape) if needs_x else None
    sums: list[Tensor | None] = [None] * len(tensors)
    for chunk in _chunks(block, x):
        *first, down = _layer_operands(block, x[chunk], tensors)
        results = [compute(operands, Epilogue(operands.bias)) for operands in first]
        *up, z = [result for result, _ in results]
        activated = ACTIVATIONS[block.activation](z)
        hidden = activated * up[0] if up else activated
        grad_hidden, of_down = _backward(down._replace(x=hidden), grad[chunk], [], needs_hidden, needs_down)
        of_first: list[Tensor | None] = []
        if grad_hidden is None:
            of_first += [None] * (len(tensors) - len(of_down))
        else:
            grad_activated = grad_hidden * up[0] if up else grad_hidden
            grads = [grad_hidden * activated] * len(up) + [_DERIVATIVES[block.activation](grad_activated, z)]
            grad_rows = grad[chunk] if needs_x and block.residual else None
            for operands, (_, saved), grad_z, needs in zip(first, results, grads, needs_first, strict=True):
                out = grad_x[chunk] if grad_x is not None and operands is first[-1] else None
                into = Epilogue(addend=grad_rows, out=out)
                grad_rows, of_layer = _backward(operands, grad_z, saved, needs_x, needs, into)
                of_first += of_layer
        pairs = zip(sums, (*of_first, *of_down), strict=True)
        sums = [one if total is None or one is None else total.add_(one) for total, one in pairs]
    return [grad_x, *[None if total is None else total.to(x.dtype) for total in sums]]


def _backward(
    operands: Operands,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs: tuple[Sequence[bool], bool | None],
    epilogue: Epilogue = NO_EPILOGUE,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of a layer's input, with an epilogue, and of its factors and bias in float32."""
    needs_factors, needs_bias = needs
    grad_x, found = gradients(operands, grad, saved, needs_x, needs_factors, epilogue, dtype=torch.float32)
    if operands.bias is not None:
        found.append(grad.sum(0, dtype=torch.float32) if needs_bias else None)
    return grad_x, found


def _layer_operands(block: FeedForwardStructure, x: Tensor, tensors: Sequence[Tensor]) -> list[Operands]:
    """Return the operands of all layers; those of down still have x as the input."""
    layers = zip(block.structures, block.split(tensors), strict=True)
    return [Operands(structure, factors, x, bias) for structure, (factors, bias) in layers]


def _chunks(block: FeedForwardStructure, x: Tensor) -> list[slice]:
    """Return the tokens of every chunk, a power of two of them but for the last; without tokens, one empty chunk."""
    fitting = CHUNK_BYTES // (block.features[1] * x.itemsize)
    size = max(_MIN_TOKENS, 1 << max(fitting.bit_length() - 1, 0))
    return [slice(start, start + size) for start in range(0, max(x.shape[0], 1), size)]
