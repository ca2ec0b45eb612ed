"""The ways to run a case: `torch.nn.Linear`, our layer as dispatched and by each backend, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn import Linear
from einlinear.structures import Structure
from einlinear_lab.bench import baselines
from einlinear_lab.bench.cases import DTYPES, Case

DENSE = "nn.Linear"
OURS = "el.Linear"
SAVING = "el.Linear, saving"
RECOMPUTING = "el.Linear, recomputing"
COPYING = "copying"
COMPILED = "torch.compile"
BLOCKTT = "tltorch BlockTT"

Store = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Variant:
    """One way to compute y = x W^T + bias.

    Attributes:
        name: in the results.
        weights: what W is made of, the leaves whose gradients a training step computes.
        forward: x of shape (n, in_features) to y.
        stored: takes factors as the structure has them to tensors arranged as `weights`.
    """

    name: str
    weights: Sequence[Tensor]
    forward: Callable[[Tensor], Tensor]
    stored: Store = list


@dataclass(frozen=True)
class Problem:
    """A case with tensors: what all variants compute with.

    Attributes:
        case, structure: what it is.
        layer: ours, whose factors all variants of the structure have, arranged in their own way.
        dense: a layer with the same matrix, rounded to the dtype.
        x, grad: the input, and the gradient of the output.
    """

    case: Case
    structure: Structure
    layer: Linear
    dense: nn.Linear
    x: Tensor
    grad: Tensor

    @property
    def bias(self) -> nn.Parameter | None:
        return self.layer.bias if isinstance(self.layer.bias, nn.Parameter) else None

    @property
    def biases(self) -> list[nn.Parameter]:
        """The bias, if there is one: all variants share it."""
        return [] if self.bias is None else [self.bias]

    def step(self, variant: Variant) -> list[Tensor]:
        """One call: y, and in training the gradients of x, of the variant's weights and of the bias."""
        y = variant.forward(self.x)
        if self.case.mode != "train":
            return [y]
        return [y, *torch.autograd.grad(y, [self.x, *variant.weights, *self.biases], self.grad)]

    def differentiating(self) -> AbstractContextManager[object]:
        """Where calls are to be made: without gradients, but for training."""
        return nullcontext() if self.case.mode == "train" else torch.no_grad()


def problem(case: Case) -> Problem:
    """Random tensors for a case, the same ones every time."""
    structure, dtype = case.build(), DTYPES[case.dtype]
    torch.manual_seed(0)
    layer = Linear(case.in_features, case.out_features, structure, case.bias, device=case.device, dtype=dtype)
    x = torch.randn(case.tokens, case.in_features, device=case.device, dtype=dtype, requires_grad=case.mode == "train")
    grad = torch.randn(case.tokens, case.out_features, device=case.device, dtype=dtype)
    with torch.no_grad():
        weight = ops.dense_weight(structure, [factor.double() for factor in layer.factors()])
        dense = nn.Linear(case.in_features, case.out_features, bias=False, device="meta", dtype=dtype)
        dense.weight = nn.Parameter(weight.to(dtype))
        if isinstance(layer.bias, nn.Parameter):
            dense.bias = nn.Parameter(layer.bias.normal_(), requires_grad=True)
            layer.bias = dense.bias
    return Problem(case, structure, layer, dense, x, grad)


def variants(
    p: Problem, backends: Sequence[str] | None = None, compiled: bool = False
) -> tuple[list[Variant], dict[str, str]]:
    """The variants of our structure that can run, ours first, and why each of the others cannot."""
    structure, factors = p.structure, p.layer.factors()
    found = [Variant(OURS, factors, p.layer)]
    refused: dict[str, str] = {}
    for name in ops.BACKENDS if backends is None else backends:
        why = ops.unsupported(name, structure, p.x.dtype, p.x.device)
        if why is not None:
            refused[name] = why
        else:
            found.append(Variant(name, factors, partial(_executed, p, name)))
    if p.case.mode == "train":
        found.append(Variant(SAVING, factors, partial(_recomputed, p, False)))
        found.append(Variant(RECOMPUTING, factors, partial(_recomputed, p, True)))

    stored = partial(baselines.copying_weights, structure)
    weights = _leaves(stored(factors))
    found.append(Variant(COPYING, weights, partial(_copying, p, weights), stored))

    if compiled and p.case.mode != "decode":
        torch.compiler.reset()  # or it stops compiling after a few cases
        run = torch.compile(partial(_executed, p, "reference"), fullgraph=True, dynamic=False)
        found.append(Variant(COMPILED, factors, run))

    if baselines.is_blocktt(structure) and find_spec("tltorch") is None:
        refused[BLOCKTT] = "tensorly-torch is not installed"
    elif baselines.is_blocktt(structure):
        stored = partial(baselines.blocktt_weights, structure)
        weights = _leaves(stored(factors))
        found.append(Variant(BLOCKTT, weights, baselines.blocktt(weights, p.bias), stored))
    return found, refused


def _copying(p: Problem, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    return baselines.copying(p.structure, weights, x, p.bias)


def _executed(p: Problem, backend: str, x: Tensor) -> Tensor:
    return ops.linear(p.structure, p.layer.factors(), x, p.bias, backend)


def _recomputed(p: Problem, recompute: bool, x: Tensor) -> Tensor:
    with ops.backend(recompute=recompute):
        y: Tensor = p.layer(x)
    return y


def _leaves(weights: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format)) for w in weights]
