"""Running a model on calibration data: batches in, outputs out, and the inputs of layers on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.calling import Batch as Batch
from einlinear.conversion.calling import call as call
from einlinear.conversion.calling import evaluating as evaluating

_TRIED = 2  # calls after which the output is taken not to depend on a layer
# nodes of the graph behind which a model's output is still that of its last layer
_SAME = frozenset(
    "Alias Clone Expand LogSoftmax Permute ReshapeAlias Select Sigmoid Slice Softmax Split SplitWithSizes Squeeze Stack "
    "T ToCopy Transpose Unbind UnsafeView Unsqueeze View".split()
)


class Enough(Exception):
    """What was of interest has been seen: the rest of the model need not be run."""


def output_of(result: Any) -> Tensor:
    """The tensor that counts in what a model returns: logits, the last hidden state, or the first tensor there is.

    Logits of one shape, such as those of the start and the end of an answer, are stacked. A loss does not count.

    Raises:
        ValueError: there is none.
    """
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(result, name, None), Tensor):
            return value
    if isinstance(result, Mapping):
        logits = [value for name, value in result.items() if name.endswith("_logits") and isinstance(value, Tensor)]
        if logits and all(value.shape == logits[0].shape for value in logits):
            return torch.stack(logits)
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise ValueError(f"the model returns a {type(result).__name__}, in which no tensor was found")


def tokens_of(batch: Batch, tensor: Tensor) -> Tensor:
    """(tokens, features): an input or output without padding, where an attention mask says which tokens that is."""
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != len(flat):
        return flat
    if tensor.dim() <= 2 or tensor.shape[:-1] == mask.shape:
        return flat[mask.flatten().to(flat.device, torch.bool)]
    return flat


@torch.no_grad()
def inputs_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    calls: Mapping[str, int] | None = None,
    taken: Callable[[Tensor], Any] = Tensor.clone,
) -> dict[str, list[Any]]:
    """The inputs of layers, call by call, in the order in which the layers are first called.

    Args:
        model, batch: see `call`.
        layers: by name.
        calls: how often each is called: the rest of the model is left out once they all were.
        taken: what is kept of an input: by default a copy, since the model may change it in place afterwards.
    """
    seen: dict[str, list[Any]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(name, []).append(taken(x))
        if calls is not None and all(len(seen.get(other, ())) >= count for other, count in calls.items()):
            raise Enough

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        call(model, batch)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True)
class Stage:
    """Layers that read the same input, such as the projections to queries, keys and values.

    Attributes:
        names: of the layers.
        calls: how often each is called in one pass.
    """

    names: tuple[str, ...]
    calls: int


def stages_of(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> list[Stage]:
    """The layers that the data reach, in the order in which they are called. Mostly one batch says it."""
    stages: list[Stage] = []
    left = dict(layers)
    for batch in batches:
        by_input: dict[tuple[tuple[int, int], ...], list[str]] = {}
        # holds all inputs, so that no two have the same id; one that was changed in place has another version
        seen = inputs_of(model, left, batch, taken=lambda x: (x, 0 if x.is_inference() else x._version))
        for name, inputs in seen.items():
            by_input.setdefault(tuple((id(x), version) for x, version in inputs), []).append(name)
            del left[name]
        stages += [Stage(tuple(names), len(key)) for key, names in by_input.items()]
        if not left:
            break
    return stages


@dataclass(frozen=True)
class Trace:
    """What calibration data do in a model.

    Attributes:
        called: the layers that get at least one token.
        reached: those of them that the model's output depends on.
        last: those whose outputs are the model's output, up to a softmax, a sigmoid or a change of shape.
    """

    called: frozenset[str]
    reached: frozenset[str]
    last: frozenset[str]


def trace(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> Trace:
    """Which layers the model's output depends on. Gradients of what layers put out tell it."""
    found, last, calls = set[str](), set[str](), dict.fromkeys(layers, 0)
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        for batch in batches:
            left = {name: layer for name, layer in layers.items() if name not in found and calls[name] < _TRIED}
            if not left:
                break
            made: dict[Any, str] = {}  # the node of the graph that stands for a layer's output

            def note(name: str, output: Tensor) -> Tensor:
                if not output.numel():
                    return output
                calls[name] += 1
                output.requires_grad_().register_hook(lambda _: found.add(name))
                result = output.clone()  # what is done to it in place is no output of the layer
                made[result.grad_fn] = name
                return result

            with torch.enable_grad(), hooked(left, note):
                output = output_of(call(model, batch))
                if output.requires_grad:
                    last |= _sources(output.grad_fn, made)
                    # of many logits the sum alone is kept: their gradient takes as much memory as they do
                    total = output.sum(dtype=torch.float32)
                    del output
                    total.backward()
    finally:
        for p in learning:
            p.requires_grad_()
    called = frozenset(name for name, count in calls.items() if count)
    return Trace(called, frozenset(found), frozenset(last))


def _sources(node: Any, made: Mapping[Any, str]) -> set[str]:
    """The layers whose outputs a tensor is, by its node in the graph, where nothing but its shape or scale changed."""
    found = set[str]()
    left = [node]
    while left:
        node = left.pop()
        if node in made:
            found.add(made[node])
        elif node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in _SAME:
            left += [before for before, _ in node.next_functions]
    return found


@contextmanager
def hooked(modules: Mapping[str, nn.Module], note: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `note` with the name and the output of every module that is called; what it returns goes on in its place."""
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
