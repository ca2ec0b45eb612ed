"""Feed-forward blocks of any model that run fused: hooks around a module begin and end their fusion.

While a module with blocks runs, the layers `up` and `gate` of a block return `LazyHidden`, and `down` runs the block if
it gets an activation of these. Nothing is attached to layers, and hooks hold names only, so copies of a model, and
pickled ones, have the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.fusion.lazy_hidden import DeferredCall, LazyHidden, defer
from einlinear.fusion.pointwise import Activation, find_activation
from einlinear.nn.interception import is_intercepted, is_plain_layer
from einlinear.nn.layer_calls import CURRENT, LayerCalls
from einlinear.nn.linear import Linear
from einlinear.ops.context import is_unobserved
from einlinear.structures import Structure

_TYPES = {Tensor, nn.Parameter}


class LayerNames(NamedTuple):
    """Names of the layers of a block, in the module that contains them."""

    up: str
    gate: str | None
    down: str

    @property
    def layers(self) -> list[str]:
        """The names, up and gate first."""
        return [name for name in self if name is not None]


@dataclass(frozen=True)
class BeginFusion:
    """Hook before the forward pass of a module: its blocks run fused from now on.

    Attributes:
        blocks: of the module.
        between: names of modules that hidden features pass through. With hooks on one of them, nothing runs fused.
    """

    blocks: tuple[LayerNames, ...]
    between: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        outer = CURRENT.get()
        if outer is None or isinstance(outer, FusionScope):
            scope = FusionScope(module, outer)
            if is_unobserved() and not any(self._hooked(module)):
                for block in self.blocks:
                    scope.add([_find(module, name) for name in block.layers])
            CURRENT.set(scope)

    def _hooked(self, module: nn.Module) -> Iterator[bool]:
        found = (_find(module, name) for name in self.between)
        return (inner is not None and is_intercepted(inner, FUSION_HOOKS) for inner in found)


@dataclass(frozen=True)
class EndFusion:
    """Hook after the forward pass of a module, however it ended."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        scope = CURRENT.get()
        # an interrupted forward pass may have left scopes of modules inside
        while isinstance(scope, FusionScope):
            if scope.module is module:
                CURRENT.set(scope.outer)
                # no output: the forward pass has failed
                if output is not None:
                    scope.close()
                return
            scope = scope.outer


FUSION_HOOKS = (BeginFusion, EndFusion)


@dataclass(eq=False)
class FusionScope(LayerCalls):
    """Scope in which the blocks of a module run fused: from the begin of its forward pass to the end."""

    module: nn.Module
    outer: FusionScope | None
    # the structures of a block by its layers up and gate, and its layers down
    first: dict[Linear, list[Structure]] = field(default_factory=dict)
    last: set[Linear] = field(default_factory=set)
    results: list[ref[LazyHidden]] = field(default_factory=list)
    saved_tensors_hooks: Any = field(default_factory=lambda: _saved_tensors_hooks())

    def add(self, layers: list[Any]) -> None:
        """Add a block of the layers up, gate if there is one, and down, unless one of them has to compute itself."""
        if all(is_plain_layer(layer) for layer in layers):
            structures = [layer.structure for layer in layers]
            self.first |= dict.fromkeys(layers[:-1], structures)
            self.last.add(layers[-1])

    def compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if isinstance(x, LazyHidden):
            if layer in self.last:
                return run_block(x, layer)
        elif structures := self.first.get(layer):
            return self._defer(layer, x, structures)
        return None if self.outer is None else self.outer.compute(layer, x)

    def _defer(self, layer: Linear, x: Tensor, structures: list[Structure]) -> LazyHidden | None:
        weights = deferrable_weights(layer, x)
        # where activation checkpointing began inside, it recomputes the layers without hooks: they must save the same
        if weights is None or _saved_tensors_hooks() != self.saved_tensors_hooks:
            return None
        call = DeferredCall(x, weights, self.results)
        tokens = x.numel() // layer.in_features
        why = ops.reason_not_to_fuse(structures, tokens, x.dtype, x.device, call.needs_gradients)
        return defer(call) if why is None else None

    def close(self) -> None:
        """Compute the hidden features that are still used somewhere, before anything can change their inputs."""
        for result in self.results:
            hidden = result()
            if hidden is not None:
                hidden.value()


def deferrable_weights(layer: Linear, x: Tensor) -> ops.Weights | None:
    """Return the weights of a layer if a block may compute its call, or None, such as for an unusual input."""
    is_usual = type(x) is Tensor and not x.is_nested and not x.is_meta and is_unobserved()
    if not is_usual or not x.numel() or x.shape[-1] != layer.in_features:
        return None
    return _weights_like(x, layer)


def run_block(lazy: LazyHidden, down: Linear) -> Tensor | None:
    """Return the output of the last layer of a block, computed fused, or None if the layer has to be computed."""
    activation, calls = activation_of(lazy), lazy._hidden.calls
    x, weights = calls[0].x, calls[0].weights
    is_usual = is_unobserved() and calls[0].grad_mode == torch.is_grad_enabled()
    if activation is None or not is_usual or weights.structure.out_features != down.in_features:
        return None
    last = _weights_like(x, down)
    if last is None:
        return None
    calls[0].check_input()
    if activation.gate is None:
        return ops.feed_forward(x, weights, last, None, activation.name)
    gate, up = calls[activation.gate.number], calls[1 - activation.gate.number]
    return ops.feed_forward(x, up.weights, last, gate.weights, activation.name)


def activation_of(lazy: LazyHidden) -> Activation | None:
    """Return the activation of lazy hidden features, or None if a fused block has no such."""
    hidden = lazy.hidden
    if hidden is None or hidden.calls[-1].x is not hidden.calls[0].x:
        return None
    return find_activation(hidden.expression, len(hidden.calls) == 2)


def _weights_like(x: Tensor, layer: Linear) -> ops.Weights | None:
    """Return the weights of a layer, or None unless they are plain tensors of the dtype of x."""
    factors, dtype = layer.stored_factors(), x.dtype
    factors, bias = (layer.factors(), layer.bias) if factors is None else (factors, layer._parameters["bias"])
    for tensor in factors:
        if type(tensor) not in _TYPES or tensor.dtype != dtype:
            return None
    if bias is not None and (type(bias) not in _TYPES or bias.dtype != dtype):
        return None
    return ops.Weights(layer.structure, factors, bias)


def _saved_tensors_hooks() -> Any:
    """Return the innermost hooks on tensors that are saved for backward, as activation checkpointing has them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _find(module: Any, name: str) -> Any:
    """Return a submodule, or None if there is none of this name."""
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module
