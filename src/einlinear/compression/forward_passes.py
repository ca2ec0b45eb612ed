"""Repeated forward passes that do not run a model's finished blocks again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from einlinear.compression.activations import StopForward, hooked, layer_inputs
from einlinear.nn.model_call import Batch, patched


class Passes:
    """Repeated forward passes of a model on the same batches, which skip finished blocks, given the last one's outputs.

    Between two calls of `inputs`, only layers that were asked for before may change. If none does, give the layers that
    will be asked for in turn: at the last one in a block, the outputs of the block are kept as well. `copy` returns the
    copies of outputs that are kept, in memory or elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        unchanged: Iterable[str] = (),
        copy: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> None:
        self._model, self.batches, self._copy = model, batches, copy
        self._last = {_position(model, [name]): name for name in unchanged}
        # a list of blocks by name, and the index of the first block that is not finished
        self._stack, self._start = "", 0
        # by batch: how many blocks are skipped, and the output of the last of them
        self._outputs = dict[int, tuple[int, Any]]()
        # outputs of the first block that is not finished, by batch
        self._next_outputs = dict[int, tuple[int, Any]]()
        # lists whose blocks need more than the output of the one before
        self._unskippable = set[str]()

    def inputs(
        self, calls: Mapping[str, int], numbers: Iterable[int] | None = None
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Yield the inputs of layers for every batch, or these, call by call, given how often each is called."""
        self.skip_to(calls, lambda: layer_inputs(self._model, self.batches[0], calls))
        for number in range(len(self.batches)) if numbers is None else numbers:
            yield self._layer_inputs(number, calls)

    def skip_to(self, layers: Iterable[str], run: Callable[[], Any]) -> None:
        """Skip the blocks before the first one with these layers, if `run`, on the first batch, returns the same."""
        stack, at = _position(self._model, [*layers])
        at = 0 if stack in self._unskippable else at
        if stack != self._stack or at < self._start:
            self._stack, self._start, self._outputs, self._next_outputs = stack, 0, {}, {}
        if at == self._start:
            return
        self._outputs |= self._next_outputs
        self._start, self._next_outputs = at, {}
        self._outputs.pop(0, None)
        with self.resumed(0):
            expected = run()
        try:
            with self.resumed(0):
                both = zip(tree_leaves(run()), tree_leaves(expected), strict=True)
            is_enough = 0 in self._outputs and all(torch.equal(x, y) for x, y in both)
        # a block may raise anything if it misses what an earlier one leaves elsewhere
        except Exception:
            is_enough = False
        if not is_enough:
            self._unskippable.add(stack)
            self._start, self._outputs = 0, {}

    @contextmanager
    def resumed(self, number: int) -> Iterator[None]:
        """Skip the finished blocks in the pass of a batch that is run inside, and keep the output of the last one."""
        skipped, output = self._outputs.get(number, (0, None))

        # a copy: the model may change its own in place
        def kept(*_: Any, **__: Any) -> Any:
            return tree_map_only(Tensor, Tensor.clone, output)

        with ExitStack() as after:
            for index in range(skipped):
                after.enter_context(patched(self._block(index), "forward", kept))
            if skipped < self._start:
                after.enter_context(self._recorded(number, self._start - 1, self._outputs))
            yield

    def _layer_inputs(self, number: int, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
        position = self._stack, self._start
        is_inside = all(_position(self._model, [name]) == position for name in calls)
        if self._stack and is_inside and self._last.get(position) in calls:
            with self.resumed(number), self._recorded(number, self._start, self._next_outputs, stops=True):
                # on to the end of the block
                inputs = layer_inputs(self._model, self.batches[number], dict.fromkeys(calls, sys.maxsize))
            # else the block is called several times
            if number in self._next_outputs and all(len(inputs.get(name, ())) == calls[name] for name in calls):
                return inputs
            self._next_outputs.pop(number, None)
        with self.resumed(number):
            return layer_inputs(self._model, self.batches[number], calls)

    @contextmanager
    def _recorded(
        self, number: int, index: int, outputs: dict[int, tuple[int, Any]], stops: bool = False
    ) -> Iterator[None]:
        """Keep the output of a block, if it is all tensors, in the pass that is run inside, or stop the pass there."""

        def record(_name: str, _input: Any, output: Any) -> None:
            if all(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
                outputs[number] = index + 1, tree_map_only(Tensor, self._copy, output)
            if stops:
                raise StopForward

        with hooked({self._stack: self._block(index)}, record):
            yield

    def _block(self, index: int) -> nn.Module:
        return self._model.get_submodule(f"{self._stack}.{index}")


def _position(model: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """Return the outermost list of modules with all these layers, and the index of the first; or ("", 0)."""
    positions = set[tuple[str, int]]()
    for name in names:
        parts = name.split(".")
        above = {i: model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)) if parts[i].isdigit()}
        depth = next((i for i, module in above.items() if isinstance(module, nn.ModuleList | nn.Sequential)), None)
        positions.add((".".join(parts[:depth]), int(parts[depth])) if depth else ("", 0))
    return min(positions) if len({stack for stack, _ in positions}) == 1 else ("", 0)
