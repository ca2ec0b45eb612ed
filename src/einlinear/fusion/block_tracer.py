"""`BlockTracer`: traces a model to find which layers are the first and the last of a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from einlinear import ops
from einlinear.fusion.fusion_hooks import activation_of, deferrable_weights
from einlinear.fusion.lazy_hidden import DeferredCall, HiddenExpression, LazyHidden, defer
from einlinear.fusion.pointwise import Activation
from einlinear.nn import Linear
from einlinear.nn.layer_calls import CURRENT, LayerCalls
from einlinear.nn.model_call import evaluating, uncompiled


class TracedBlock(NamedTuple):
    """A block as it was run: its layers, the innermost module around it, and modules that hidden features passed."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    module: nn.Module
    between: tuple[nn.Module, ...]


class BlockTracer(LayerCalls):
    """Tracer that follows the outputs of layers through runs of a model."""

    def __init__(self, layers: Iterable[Linear]) -> None:
        self._outcomes: dict[Linear, list[_Outcome]] = {layer: [] for layer in layers}
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
        before, known = CURRENT.get(), {layer: len(outcomes) for layer, outcomes in self._outcomes.items()}
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
            for layer, outcomes in self._outcomes.items():
                outcomes[known[layer] :] = [outcome for outcome in outcomes[known[layer] :] if outcome.block]
            raise
        finally:
            CURRENT.set(before)
            self._stack.clear()
            for hook in hooks:
                hook.remove()
        for layer, outcomes in self._outcomes.items():
            for outcome in outcomes[known[layer] :]:
                if any(result() is not None for result in outcome.results):
                    outcome.note("its hidden features are kept after the model has run")
        del output

    def was_called(self, layer: Linear) -> bool:
        return bool(self._outcomes[layer])

    def reason(self, layer: Linear) -> str | None:
        """Return why a layer is not the first of a block in one of its calls, or None."""
        for outcome in self._outcomes[layer]:
            if outcome.reason or outcome.block is None:
                return outcome.reason or "no structured layer reads its output"
        return None

    def blocks(self) -> list[TracedBlock]:
        """Return the blocks that can run fused, in the order of their layers."""
        found: dict[object, TracedBlock] = {}
        for outcomes in self._outcomes.values():
            for block in (outcome.block for outcome in outcomes):
                if block and not self.reason(block.up) and not (block.gate and self.reason(block.gate)):
                    found[block.up, block.gate, block.down, block.module] = block
        return [*found.values()]

    def compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        if not isinstance(x, LazyHidden):
            weights = deferrable_weights(layer, x) if layer in self._outcomes else None
            if weights is None:
                return None
            call = _TracedCall(x, weights, layer, [*self._stack], len(self._events))
            self._outcomes[layer].append(call.outcome)
            return defer(call)
        if x.hidden is None:
            return None
        block = self._find_block(x.hidden, activation_of(x), layer)
        calls: Any = x.hidden.calls
        for call in calls:
            call.outcome.end(block)
        if isinstance(block, str):
            return None
        return ops.linear(layer.structure, layer.factors(), x.hidden.compute(), layer.bias)

    def _find_block(self, hidden: HiddenExpression, activation: Activation | None, down: Linear) -> TracedBlock | str:
        """Return the block of which a layer is the last, or why there is none."""
        calls: Any = hidden.calls
        if calls[-1].x is not calls[0].x:
            return "its output is multiplied by that of a layer with another input"
        if activation is None:
            return "no activation that fused blocks have lies between its output and the next layer"
        if down not in self._outcomes:
            return "the layer that reads its output has hooks or a forward pass of its own"
        if any(call.has_changed_input for call in calls):
            return "its input is changed in place before the block ends"
        if any(call.outcome.block is not None for call in calls):
            return "its output is read by more than one layer"
        layers = [call.layer for call in calls]
        gate = None if activation.gate is None else layers[activation.gate.number]
        up = layers[0] if activation.gate is None else layers[1 - activation.gate.number]
        between = {*self._events[min(call.start for call in calls) :]}.difference((*layers, down))
        stacks = [*(call.stack for call in calls), self._stack]
        around = [first for first, *others in zip(*stacks) if all(module is first for module in others)]
        for module in reversed(around):
            if module not in (*layers, down) and between.union(layers, [down]) <= {*module.modules()}:
                return TracedBlock(up, gate, down, activation.name, module, tuple(between))
        return "no module around its block contains all of its layers"

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._events.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._events.append(self._stack.pop())


@dataclass
class _Outcome:
    """What became of the result of a call; the result itself is kept no longer than the model needs it."""

    results: list[ref[LazyHidden]] = field(default_factory=list)
    block: TracedBlock | None = None
    reason: str | None = None

    def end(self, block: TracedBlock | str) -> None:
        """Take note of the block that the call is part of, or of the reason why there is none."""
        if isinstance(block, str):
            self.note(block)
        else:
            self.block = block

    def note(self, reason: str) -> None:
        # the first one is the cause of others
        self.reason = self.reason or reason


class _TracedCall(DeferredCall):
    """A deferred call whose result is known."""

    __slots__ = ("layer", "outcome", "result", "stack", "start")

    def __init__(self, x: Tensor, weights: ops.Weights, layer: Linear, stack: list[nn.Module], start: int) -> None:
        self.outcome = _Outcome()
        super().__init__(x, weights, self.outcome.results)
        self.layer, self.stack, self.start = layer, stack, start
        self.result = ops.linear(weights.structure, weights.factors, x, weights.bias)

    def compute(self, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return self.result

    def check_input(self) -> None:
        """Nothing: the result is known, whatever the input is now."""

    def values_used(self, function: Any) -> None:
        name = getattr(function, "__name__", str(function))
        # torch calls a property by its getter
        name = function.__self__.__name__ if name == "__get__" else name
        self.outcome.note(f"its output is used by {name}, which fused blocks do not have")
