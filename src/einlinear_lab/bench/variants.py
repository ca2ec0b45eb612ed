"""The variants of a case: `torch.nn.Linear`, `el.Linear` as dispatched and by each backend, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import cast

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
TWO = "two nn.Linear"
COMPILED = "torch.compile"
BLOCKTT = "tltorch BlockTT"
# of others, which may not support a case
FOREIGN = (COMPILED, BLOCKTT)


@dataclass(frozen=True)
class Variant:
    """An implementation of y = x W^T + bias, the parameters of W, and their layout as a function of the factors."""

    name: str
    weights: Sequence[Tensor]
    forward: Callable[[Tensor], Tensor]
    stored: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list


@dataclass(frozen=True)
class Workload:
    """The tensors of a case that all variants share: a structured and a dense layer with one matrix, x and gradient."""

    case: Case
    structure: Structure
    layer: Linear
    dense: nn.Linear
    x: Tensor
    grad: Tensor

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which all variants share."""
        return self.layer.bias if isinstance(self.layer.bias, nn.Parameter) else None

    @property
    def biases(self) -> list[nn.Parameter]:
        return [] if self.bias is None else [self.bias]

    def step(self, variant: Variant) -> list[Tensor]:
        """Call a variant: return y, and in training the gradients of x, of the weights and of the bias."""
        y = variant.forward(self.x)
        if self.case.mode != "train":
            return [y]
        return [y, *torch.autograd.grad(y, [self.x, *variant.weights, *self.biases], self.grad)]

    def differentiating(self) -> AbstractContextManager[object]:
        """Return the context of all calls: gradients are enabled in training only."""
        return nullcontext() if self.case.mode == "train" else torch.no_grad()


def make_workload(case: Case) -> Workload:
    """Return random tensors for a case, the same ones in every call."""
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
            dense.bias = layer.bias = nn.Parameter(layer.bias.normal_(), requires_grad=True)
    return Workload(case, structure, layer, dense, x, grad)


def make_variants(
    p: Workload, backends: Sequence[str] | None = None, compiled: bool = False
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants that can run, el.Linear first, and the reason why each of the others cannot."""
    structure, factors = p.structure, p.layer.factors()
    variants = [Variant(OURS, factors, p.layer)]
    refused: dict[str, str] = {}
    for name in ops.BACKENDS if backends is None else backends:
        if reason := ops.unsupported(name, structure, p.x.dtype, p.x.device):
            refused[name] = reason
        else:
            variants.append(Variant(name, factors, partial(_by_backend, p, name)))
    if p.case.mode == "train":
        both = {SAVING: False, RECOMPUTING: True}
        variants += [Variant(name, factors, partial(_recomputed, p, choice)) for name, choice in both.items()]

    stored = partial(baselines.copying_weights, structure)
    weights = _leaves(stored(factors))
    variants.append(Variant(COPYING, weights, partial(baselines.copying, structure, weights, bias=p.bias), stored))

    if _is_low_rank(structure):
        narrow, wide = (nn.Linear(f.fan_in, f.fan_out, bias=False, device="meta") for f in structure.factors)
        narrow.weight, wide.weight = (cast(nn.Parameter, factor) for factor in factors)
        wide.bias = cast(nn.Parameter, p.bias)
        variants.append(Variant(TWO, factors, nn.Sequential(narrow, wide)))

    if compiled and p.case.mode != "decode":
        # without a reset torch stops compiling after a few cases
        torch.compiler.reset()
        run = torch.compile(partial(_by_backend, p, "reference"), fullgraph=True, dynamic=False)
        variants.append(Variant(COMPILED, factors, run))

    if baselines.is_blocktt(structure):
        if find_spec("tltorch") is None:
            refused[BLOCKTT] = "tensorly-torch is not installed"
        else:
            stored = partial(baselines.blocktt_weights, structure)
            weights = _leaves(stored(factors))
            variants.append(Variant(BLOCKTT, weights, baselines.blocktt(weights, p.bias), stored))
    return variants, refused


def _is_low_rank(structure: Structure) -> bool:
    """Return whether the factors are the weights of two dense layers, one after the other."""
    term, *others = structure.terms
    plain = all(f.axes == f.new + f.contracted and len(f.axes) == 2 and not f.free for f in term.factors)
    return plain and len(term.factors) == 2 and not others


def _by_backend(p: Workload, backend: str, x: Tensor) -> Tensor:
    return ops.linear(p.structure, p.layer.factors(), x, p.bias, backend)


def _recomputed(p: Workload, recompute: bool, x: Tensor) -> Tensor:
    with ops.backend(recompute=recompute):
        return cast(Tensor, p.layer(x))


def _leaves(weights: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format)) for w in weights]
