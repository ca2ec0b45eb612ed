"""The variants of a case.

Layers: `torch.nn.Linear`, `el.Linear` as dispatched and by each backend, and the baselines. Feed-forward blocks: of
`torch.nn.Linear`, of `el.Linear` one after the other, also by each backend, `el.FeedForward` as dispatched, and fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn import FeedForward, Linear
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
BLOCK = "el.FeedForward"
FUSED = "fused"
# of others, which may not support a case
FOREIGN = (COMPILED, BLOCKTT)


@dataclass(frozen=True)
class Variant:
    """An implementation of a layer or block, its weights, and their layout as a function of the factors."""

    name: str
    weights: Sequence[Tensor]
    forward: Callable[[Tensor], Tensor]
    stored: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list


@dataclass(frozen=True)
class Workload:
    """The tensors of a case that all variants share: structured layers, dense ones with the same matrices, x, gradient.

    There is a single layer, or those of a block: up, gate if it is gated, down.
    """

    case: Case
    layers: tuple[Linear, ...]
    dense_layers: tuple[nn.Linear, ...]
    x: Tensor
    grad: Tensor

    @property
    def structures(self) -> list[Structure]:
        return [layer.structure for layer in self.layers]

    @property
    def factors(self) -> list[Tensor]:
        """The factors of all layers."""
        return [factor for layer in self.layers for factor in layer.factors()]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The biases, which all variants share."""
        return [layer.bias for layer in self.layers if isinstance(layer.bias, nn.Parameter)]

    @property
    def dense(self) -> Variant:
        weights = [layer.weight for layer in self.dense_layers]
        return Variant(DENSE, weights, partial(self.through, self.dense_layers))

    def through(self, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Return the output of a single layer, or of the layers of a block, one after the other."""
        if not self.case.is_block:
            return layers[0](x)
        up, *gate, down = layers
        activation = ops.ACTIVATIONS[self.case.activation]
        return down(activation(gate[0](x)) * up(x) if gate else activation(up(x)))

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
    structures = case.build()
    options: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
    torch.manual_seed(0)
    layers = tuple(Linear(s.in_features, s.out_features, s, case.bias, **options) for s in structures)
    x = torch.randn(case.tokens, structures[0].in_features, **options, requires_grad=case.mode == "train")
    grad = torch.randn(case.tokens, structures[-1].out_features, **options)
    return Workload(case, layers, tuple(map(_dense, layers)), x, grad)


@torch.no_grad()
def _dense(layer: Linear) -> nn.Linear:
    """Return the dense layer with the matrix and the bias of a layer, after a new draw of the bias."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    factors = layer.factors()
    weight = ops.dense_weight(layer.structure, [factor.double() for factor in factors])
    dense.weight = nn.Parameter(weight.to(factors[0].dtype))
    if isinstance(layer.bias, nn.Parameter):
        dense.bias = layer.bias = nn.Parameter(layer.bias.normal_(), requires_grad=True)
    return dense


def make_variants(
    p: Workload, backends: Sequence[str] | None = None, compiled: bool = False
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants that can run, el.Linear first, and the reason why each of the others cannot."""
    if p.case.is_block:
        return _make_block_variants(p, backends or ())
    (layer,), (structure,), factors = p.layers, p.structures, p.factors
    bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
    variants = [Variant(OURS, factors, layer)]
    refused: dict[str, str] = {}
    for name in ops.BACKENDS if backends is None else backends:
        if reason := ops.reason_unsupported(name, structure, p.x.dtype, p.x.device):
            refused[name] = reason
        else:
            variants.append(Variant(name, factors, partial(_by_backend, p, name)))
    if p.case.mode == "train":
        both = {SAVING: False, RECOMPUTING: True}
        variants += [Variant(name, factors, partial(_recomputed, p, choice)) for name, choice in both.items()]

    stored = partial(baselines.copying_weights, structure)
    weights = _leaves(stored(factors))
    variants.append(Variant(COPYING, weights, partial(baselines.copying, structure, weights, bias=bias), stored))

    if _is_low_rank(structure):
        narrow, wide = (nn.Linear(f.fan_in, f.fan_out, bias=False, device="meta") for f in structure.factors)
        narrow.weight, wide.weight = (cast(nn.Parameter, factor) for factor in factors)
        wide.bias = cast(nn.Parameter, bias)
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
            variants.append(Variant(BLOCKTT, weights, baselines.blocktt(weights, bias), stored))
    return variants, refused


def make_block(p: Workload) -> FeedForward:
    """Return the feed-forward block of the layers of a workload."""
    case = p.case
    sizes = case.in_features, case.out_features, case.structure
    block = FeedForward(*sizes, case.activation, case.gated, case.bias, device="meta")
    block.up, block.down = p.layers[0], p.layers[-1]
    if case.gated:
        block.gate = p.layers[1]
    return block


def _make_block_variants(p: Workload, backends: Sequence[str]) -> tuple[list[Variant], dict[str, str]]:
    """Fused blocks run with the backend "triton" if it is among the backends, else with "cpu"."""
    block, fusing = make_block(p), "triton" if "triton" in backends else "cpu"

    def by(backend: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with ops.backend(backend):
            return forward(x)

    by_layers = partial(p.through, p.layers)
    forwards: dict[str, Callable[[Tensor], Tensor]] = {OURS: by_layers, BLOCK: block}
    forwards |= {name: partial(by, name, by_layers) for name in backends}
    with ops.backend(fusing):
        refusal = block.reason_not_to_fuse(p.x)
    if refusal is None:
        forwards[FUSED] = partial(by, fusing, block)
    variants = [Variant(name, p.factors, forward) for name, forward in forwards.items()]
    return variants, {FUSED: refusal} if refusal else {}


def _is_low_rank(structure: Structure) -> bool:
    """Return whether the factors are the weights of two dense layers, one after the other."""
    term, *others = structure.terms
    plain = all(f.axes == f.new + f.contracted and len(f.axes) == 2 and not f.free for f in term.factors)
    return plain and len(term.factors) == 2 and not others


def _by_backend(p: Workload, backend: str, x: Tensor) -> Tensor:
    (layer,) = p.layers
    return ops.linear(layer.structure, layer.factors(), x, layer.bias, backend)


def _recomputed(p: Workload, recompute: bool, x: Tensor) -> Tensor:
    with ops.backend(recompute=recompute):
        return p.through(p.layers, x)


def _leaves(weights: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format)) for w in weights]
