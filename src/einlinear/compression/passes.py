"""Repeated forward passes of a model on the same batches, which skip finished blocks.

Most models hand a tensor from block to block of an `nn.ModuleList` or `nn.Sequential`: a block needs no more than the
output of the one before it. Sequential compression asks for the inputs of one layer after the other. With the outputs
of the last finished block kept, every block runs a few times, not once for each layer behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.activations import StopForward, hooked, layer_inputs
from einlinear.nn.model_call import Batch, call


class Passes:
    """Forward passes of a model. Between two calls of `inputs`, only layers that were asked for before may change."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        # a list of blocks by name, and the index of its first block that runs
        self._stack, self._start = "", 0
        # outputs of the block before that one, by batch
        self._outputs: list[Any] = []
        # lists whose blocks need more than the output of the one before
        self._unskippable = set[str]()

    def inputs(self, calls: Mapping[str, int]) -> Iterator[dict[str, list[Tensor]]]:
        """Yield the inputs of layers for every batch, call by call, given how often each is called, by name."""
        layers = {name: self._model.get_submodule(name) for name in calls}
        self._skip_to(layers, calls)
        for number in range(len(self._batches)):
            yield self._inputs(number, layers, calls)

    def _inputs(
        self, number: int, layers: Mapping[str, nn.Module], calls: Mapping[str, int]
    ) -> dict[str, list[Tensor]]:
        with self._skipping(number):
            return layer_inputs(self._model, layers, self._batches[number], calls)

    def _skip_to(self, layers: Mapping[str, nn.Module], calls: Mapping[str, int]) -> None:
        """Keep the outputs of the block before the first one with these layers."""
        stack, at = _position(self._model, [*layers])
        at = 0 if stack in self._unskippable else at
        if stack != self._stack or at < self._start:
            self._stack, self._start, self._outputs = stack, 0, []
        if at == self._start:
            return
        expected = layer_inputs(self._model, layers, self._batches[0], calls)
        try:
            outputs = [self._output(number, at - 1) for number in range(len(self._batches))]
            self._start, self._outputs = at, outputs
            is_enough = _is_plain(outputs) and _same(self._inputs(0, layers, calls), expected)
        # a block may raise anything if it misses what an earlier one leaves elsewhere
        except Exception:
            is_enough = False
        if not is_enough:
            self._unskippable.add(stack)
            self._start, self._outputs = 0, []

    @torch.no_grad()
    def _output(self, number: int, index: int) -> Any:
        """Return the output of a block; None if it is not called."""
        outputs: list[Any] = []

        def record(_name: str, _input: Any, output: Any) -> None:
            outputs.append(output)
            raise StopForward

        block = self._model.get_submodule(f"{self._stack}.{index}")
        with self._skipping(number), hooked({self._stack: block}, record):
            call(self._model, self._batches[number])
        return _copy(outputs[0]) if outputs else None

    @contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """Replace every finished block by one that returns the stored output of the last of them."""
        with ExitStack() as after:
            for index in range(self._start):
                block = self._model.get_submodule(f"{self._stack}.{index}")
                # other libraries replace it as well
                before = vars(block).get("forward")
                block.forward = partial(_replay, self._outputs[number])
                undo = partial(setattr, block, "forward", before) if before else partial(delattr, block, "forward")
                after.callback(undo)
            yield


def _position(model: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """The outermost list of modules with all these layers, and the index of the first; ("", 0) without such a list."""
    indices: dict[str, list[int]] = {}
    for name in names:
        parts = name.split(".")
        above = [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
        lists = [isinstance(module, nn.ModuleList | nn.Sequential) for module in above]
        depth = next((i for i, is_list in enumerate(lists, 1) if is_list and parts[i].isdigit()), 0)
        if not depth:
            return "", 0
        indices.setdefault(".".join(parts[:depth]), []).append(int(parts[depth]))
    ((stack, positions), *others) = indices.items()
    return ("", 0) if others else (stack, min(positions))


def _replay(output: Any, *_: Any, **__: Any) -> Any:
    # a copy, which the model may change in place
    return _copy(output)


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_copy(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _is_plain(outputs: Sequence[Any]) -> bool:
    """Return whether all are tensors or tuples of such."""
    parts = [part for output in outputs for part in (output if type(output) is tuple else (output,))]
    return all(isinstance(part, Tensor) for part in parts)


def _same(inputs: Mapping[str, Sequence[Tensor]], others: Mapping[str, Sequence[Tensor]]) -> bool:
    return inputs.keys() == others.keys() and all(
        len(xs) == len(others[name]) and all(map(torch.equal, xs, others[name])) for name, xs in inputs.items()
    )
