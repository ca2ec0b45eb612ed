"""A model run on the same batches again and again, each time from the block on where something is to be seen.

Most models hand a tensor from block to block of an `nn.ModuleList` or `nn.Sequential`, so what came out of the blocks
before is all that those after need to know. Calibration in turn asks for one layer after the other: with the outputs of
the last finished block kept, it runs every block a few times, not every block once for each layer behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einlinear_lab.pretrained.running import Batch, Enough, call, hooked, inputs_of


class Passes:
    """A model and its batches. Between two calls of `inputs`, only layers that were asked for before may change.

    Args:
        model: in evaluation mode.
        batches: see `running.call`. For each, the output of one block is kept.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._stack, self._at = "", 0  # the blocks before this one of this list are not run
        self._kept: list[Any] = []  # what the last of them puts out, by batch
        self._whole = set[str]()  # lists whose blocks need more than what the one before puts out

    def inputs(self, calls: Mapping[str, int]) -> Iterator[dict[str, list[Tensor]]]:
        """For every batch, the inputs of layers, call by call.

        Args:
            calls: how often each layer is called, by name.
        """
        layers = {name: self._model.get_submodule(name) for name in calls}
        self._go_to(layers, calls)
        for number in range(len(self._batches)):
            yield self._seen(number, layers, calls)

    def _seen(self, number: int, layers: Mapping[str, nn.Module], calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
        with self._skipping(number):
            return inputs_of(self._model, layers, self._batches[number], calls)

    def _go_to(self, layers: Mapping[str, nn.Module], calls: Mapping[str, int]) -> None:
        """Keep what comes out before the first of the blocks that have these layers."""
        stack, at = _position(self._model, [*layers])
        at = 0 if stack in self._whole else at
        if stack != self._stack or at < self._at:
            self._stack, self._at, self._kept = stack, 0, []
        if at == self._at:
            return
        expected = inputs_of(self._model, layers, self._batches[0], calls)
        try:
            kept = [self._output(number, at - 1) for number in range(len(self._batches))]
            self._at, self._kept = at, kept
            enough = _is_plain(kept) and _same(self._seen(0, layers, calls), expected)
        except Exception:  # whatever a block raises that misses what an earlier one would have left behind
            enough = False
        if not enough:
            self._whole.add(stack)
            self._at, self._kept = 0, []

    @torch.no_grad()
    def _output(self, number: int, index: int) -> Any:
        """Of a block; None if it is not called."""
        outputs: list[Any] = []

        def note(name: str, output: Any) -> None:
            outputs.append(output)
            raise Enough

        block = self._model.get_submodule(f"{self._stack}.{index}")
        with self._skipping(number), hooked({self._stack: block}, note), suppress(Enough):
            call(self._model, self._batches[number])
        return _copy(outputs[0]) if outputs else None

    @contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        """All blocks that are finished put out what the last of them does."""
        with ExitStack() as after:
            for index in range(self._at):
                block = self._model.get_submodule(f"{self._stack}.{index}")
                own = vars(block).get("forward")  # other libraries put one there too
                block.forward = partial(_kept, self._kept[number])
                after.callback(partial(setattr, block, "forward", own) if own else partial(delattr, block, "forward"))
            yield


def _position(model: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """The outermost list of modules that has all these layers, and the place of the first; ("", 0) if there is none."""
    found: dict[str, list[int]] = {}
    for name in names:
        parts = name.split(".")
        above = [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
        lists = [
            i
            for i, module in enumerate(above, 1)
            if isinstance(module, nn.ModuleList | nn.Sequential) and parts[i].isdigit()
        ]
        if not lists:
            return "", 0
        found.setdefault(".".join(parts[: lists[0]]), []).append(int(parts[lists[0]]))
    if len(found) != 1:
        return "", 0
    ((stack, places),) = found.items()
    return stack, min(places)


def _kept(output: Any, *_: Any, **__: Any) -> Any:
    return _copy(output)  # the model may change it in place


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_copy(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _is_plain(outputs: Sequence[Any]) -> bool:
    """Whether all are tensors or tuples of such."""
    parts = [part for output in outputs for part in (output if type(output) is tuple else (output,))]
    return all(isinstance(part, Tensor) for part in parts)


def _same(inputs: Mapping[str, Sequence[Tensor]], others: Mapping[str, Sequence[Tensor]]) -> bool:
    return inputs.keys() == others.keys() and all(
        len(xs) == len(others[name]) and all(map(torch.equal, xs, others[name])) for name, xs in inputs.items()
    )
