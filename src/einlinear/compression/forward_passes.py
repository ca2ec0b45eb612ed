"""Repeated forward passes that do not run a model's finished blocks again."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from einlinear.compression.activations import StopForward, hooked, layer_inputs
from einlinear.nn.model_call import Batch, call, patched


class Passes:
    """Repeated forward passes of a model on the same batches, which skip finished blocks, given the last one's outputs.

    Between two calls of `inputs`, only layers that were asked for before may change. If none does, give the layers that
    will be asked for in turn: at the last one in a block, the outputs of the block are kept as well.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], unchanged: Iterable[str] = ()) -> None:
        self._model, self.batches = model, batches
        self._last = {_position(model, [name]): name for name in unchanged}
        # outputs of the first block that runs, by batch
        self._next_outputs = dict[int, Any]()
        # a list of blocks by name, the index of its first block that runs, and the outputs of the one before, by batch
        self._stack, self._start, self._outputs = "", 0, list[Any]()
        # lists whose blocks need more than the output of the one before
        self._unskippable = set[str]()

    def inputs(
        self, calls: Mapping[str, int], numbers: Iterable[int] | None = None
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Yield the inputs of layers for every batch, or these, call by call, given how often each is called."""
        self._skip_to(calls)
        for number in range(len(self.batches)) if numbers is None else numbers:
            yield self._layer_inputs(number, calls)

    def _layer_inputs(self, number: int, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
        position = self._stack, self._start
        is_inside = all(_position(self._model, [name]) == position for name in calls)
        if self._stack and is_inside and self._last.get(position) in calls:
            with self._block_output(number, self._start) as outputs:
                # on to the end of the block
                inputs = layer_inputs(self._model, self.batches[number], dict.fromkeys(calls, sys.maxsize))
            # else the block is called several times
            if outputs and all(len(inputs.get(name, ())) == calls[name] for name in calls):
                self._next_outputs[number] = outputs[0]
                return inputs
        with self._skipping(number):
            return layer_inputs(self._model, self.batches[number], calls)

    def _skip_to(self, calls: Mapping[str, int]) -> None:
        """Keep the outputs of the block before the first one with these layers."""
        stack, at = _position(self._model, [*calls])
        at = 0 if stack in self._unskippable else at
        if stack != self._stack or at < self._start:
            self._stack, self._start, self._outputs, self._next_outputs = stack, 0, [], {}
        if at == self._start:
            return
        expected = layer_inputs(self._model, self.batches[0], calls)
        kept = self._next_outputs if at == self._start + 1 else {}
        try:
            outputs = [kept.pop(n) if n in kept else self._output(n, at - 1) for n in range(len(self.batches))]
            self._start, self._outputs, self._next_outputs = at, outputs, {}
            both = zip(tree_leaves(self._layer_inputs(0, calls)), tree_leaves(expected), strict=True)
            is_plain = all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
            is_enough = is_plain and all(torch.equal(x, y) for x, y in both)
        # a block may raise anything if it misses what an earlier one leaves elsewhere
        except Exception:
            is_enough = False
        if not is_enough:
            self._unskippable.add(stack)
            self._start, self._outputs, self._next_outputs = 0, [], {}

    def _output(self, number: int, index: int) -> Any:
        """Return the output of a block; None if it is not called."""
        with self._block_output(number, index) as outputs, torch.no_grad():
            call(self._model, self.batches[number])
        return outputs[0] if outputs else None

    @contextmanager
    def _block_output(self, number: int, index: int) -> Iterator[list[Any]]:
        """Keep the output of a block in the pass that is run inside, and stop the pass there."""
        outputs: list[Any] = []

        def record(_name: str, _input: Any, output: Any) -> None:
            outputs.append(tree_map_only(Tensor, Tensor.clone, output))
            raise StopForward

        block = self._model.get_submodule(f"{self._stack}.{index}")
        with self._skipping(number), hooked({self._stack: block}, record):
            yield outputs

    @contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """Replace every finished block by one that returns a copy of the stored output of the last of them."""

        def stored(*_: Any, **__: Any) -> Any:
            return tree_map_only(Tensor, Tensor.clone, self._outputs[number])

        with ExitStack() as after:
            for index in range(self._start):
                after.enter_context(patched(self._model.get_submodule(f"{self._stack}.{index}"), "forward", stored))
            yield


def _position(model: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """Return the outermost list of modules with all these layers, and the index of the first; or ("", 0)."""
    positions = set[tuple[str, int]]()
    for name in names:
        parts = name.split(".")
        above = {i: model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)) if parts[i].isdigit()}
        depth = next((i for i, module in above.items() if isinstance(module, nn.ModuleList | nn.Sequential)), None)
        positions.add((".".join(parts[:depth]), int(parts[depth])) if depth else ("", 0))
    return min(positions) if len({stack for stack, _ in positions}) == 1 else ("", 0)
