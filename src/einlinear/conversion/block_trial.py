"""Trial runs of a model: they show which layers are the first and the last of a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from einlinear import ops
from einlinear.nn import Linear
from einlinear.nn.fused_blocks import activation_of, deferrable_weights
from einlinear.nn.layer_calls import CURRENT, LayerCalls
from einlinear.nn.lazy_hidden import DeferredCall, Hidden, LazyHidden, defer
from einlinear.nn.model_call import evaluating, uncompiled
from einlinear.nn.pointwise import Activation


class FoundBlock(NamedTuple):
    """A block as it was run: its layers, the innermost module around it, and modules that hidden features passed."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    module: nn.Module
    between: tuple[nn.Module, ...]


class BlockTrial(LayerCalls):
    """Follows the outputs of layers through a model."""

    def __init__(self, layers: Iterable[Linear]) -> None:
        self._calls: dict[Linear, list[_TrialCall]] = {layer: [] for layer in layers}
        # the modules that run, the innermost last; and every module when it begins and when it ends
        self._stack: list[nn.Module] = []
        self._events: list[nn.Module] = []

    def run(self, model: nn.Module, function: Callable[[], object]) -> None:
        """Call a function that runs the model, which is in evaluation mode meanwhile."""
        hooks: list[RemovableHandle] = []
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.append(module.register_forward_pre_hook(self._begin, prepend=True))
                hooks.append(module.register_forward_hook(self._end, always_call=True))
        before, known = CURRENT.get(), {layer: len(calls) for layer, calls in self._calls.items()}
        CURRENT.set(self)
        try:
            # leaving inference mode enables gradients
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                evaluating(model),
                uncompiled(),
                torch.random.fork_rng(devices=[]),
            ):
                # an output may hold hidden features
                output = function()
        except Exception:
            # an error says nothing about blocks before, but leaves other layers without a reader
            for layer, calls in self._calls.items():
                calls[known[layer] :] = [call for call in calls[known[layer] :] if call.block is not None]
            raise
        finally:
            CURRENT.set(before)
            self._stack.clear()
            for hook in hooks:
                hook.remove()
        for layer, calls in self._calls.items():
            for call in calls[known[layer] :]:
                if any(result() is not None for result in call.results):
                    call.note("its hidden features are kept after the model has run")
        del output

    def was_called(self, layer: Linear) -> bool:
        return bool(self._calls[layer])

    def reason(self, layer: Linear) -> str | None:
        """Return why a layer is not the first of a block in one of its calls, or None."""
        for call in self._calls[layer]:
            if call.reason or call.block is None:
                return call.reason or "no structured layer reads its output"
        return None

    def blocks(self) -> list[FoundBlock]:
        """Return the blocks that can run fused, in the order of their layers."""
        found: dict[object, FoundBlock] = {}
        for calls in self._calls.values():
            for block in (call.block for call in calls):
                if block and not self.reason(block.up) and not (block.gate and self.reason(block.gate)):
                    found[block.up, block.gate, block.down, block.module] = block
        return [*found.values()]

    def compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if not isinstance(x, LazyHidden):
            weights = deferrable_weights(layer, x) if layer in self._calls else None
            if weights is None:
                return None
            call = _TrialCall(x, weights, layer, [*self._stack], len(self._events))
            self._calls[layer].append(call)
            return defer(call)
        if x.hidden is None:
            return None
        block = self._find_block(x.hidden, activation_of(x), layer)
        calls: Any = x.hidden.calls
        for call in calls:
            call.end(block)
        if isinstance(block, str):
            return None
        return ops.linear(layer.structure, layer.factors(), x.hidden.compute(), layer.bias)

    def _find_block(self, hidden: Hidden, activation: Activation | None, down: Linear) -> FoundBlock | str:
        """Return the block of which a layer is the last, or why there is none."""
        calls: Any = hidden.calls
        if calls[-1].x is not calls[0].x:
            return "its output is multiplied by that of a layer with another input"
        if activation is None:
            return "no activation that fused blocks have lies between its output and the next layer"
        if down not in self._calls:
            return "the layer that reads its output has hooks or a forward pass of its own"
        if any(call.has_changed_input for call in calls):
            return "its input is changed in place before the block ends"
        if any(call.block is not None for call in calls):
            return "its output is read by more than one layer"
        layers = [call.layer for call in calls]
        gate = None if activation.gate is None else layers[activation.gate.number]
        up = layers[0] if activation.gate is None else layers[1 - activation.gate.number]
        between = {*self._events[min(call.start for call in calls) :]}.difference((*layers, down))
        stacks = [*(call.stack for call in calls), self._stack]
        around = [first for first, *others in zip(*stacks) if all(module is first for module in others)]
        for module in reversed(around):
            if module not in (*layers, down) and between.union(layers, [down]) <= {*module.modules()}:
                return FoundBlock(up, gate, down, activation.name, module, tuple(between))
        return "no module around its block contains all of its layers"

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._events.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._events.append(self._stack.pop())


class _TrialCall(DeferredCall):
    """A deferred call whose result is known, and what became of it."""

    __slots__ = ("block", "layer", "reason", "result", "stack", "start")

    def __init__(self, x: Tensor, weights: ops.Weights, layer: Linear, stack: list[nn.Module], start: int) -> None:
        super().__init__(x, weights, [])
        self.layer, self.stack, self.start = layer, stack, start
        self.result = ops.linear(weights.structure, weights.factors, x, weights.bias)
        self.block: FoundBlock | None = None
        self.reason: str | None = None

    def compute(self, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return self.result

    def check_input(self) -> None:
        """Nothing: the result is known, whatever the input is now."""

    def values_used(self, function: Any) -> None:
        # torch calls a property by its getter
        name = getattr(function.__self__ if function.__name__ == "__get__" else function, "__name__", str(function))
        self.note(f"its output is used by {name}, which fused blocks do not have")

    def end(self, block: FoundBlock | str) -> None:
        """Take note of the block that the call is part of, or of the reason why there is none."""
        if isinstance(block, str):
            self.note(block)
        else:
            self.block = block

    def note(self, reason: str) -> None:
        # the first one is the cause of others
        self.reason = self.reason or reason
