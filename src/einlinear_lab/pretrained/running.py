"""Running a model on calibration data: batches in, outputs out, and the inputs of layers on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn import Linear
from einlinear.nn.model_call import Batch as Batch
from einlinear.nn.model_call import call as call
from einlinear.nn.model_call import evaluating as evaluating
from einlinear.nn.third_party import is_conv1d

_TRIED = 2  # calls after which the output is taken not to depend on a layer
# nodes of the graph behind which a model's output is still that of its last layer
_SAME = {
    *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze"),
    *("Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    *("LogSoftmax", "Sigmoid", "Softmax"),
}
LARGE = 2**12  # features of outputs that are worth computing again, slice by slice


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


def inputs_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    calls: Mapping[str, int] | None = None,
    taken: Callable[[Tensor], Any] = Tensor.clone,
    gradients: bool = False,
) -> dict[str, list[Any]]:
    """The inputs of layers, call by call, in the order in which the layers are first called.

    Args:
        model, batch: see `call`.
        layers: by name.
        calls: how often each is called: the rest of the model is left out once they all were.
        taken: what is kept of an input: by default a copy, since the model may change it in place afterwards.
        gradients: whether the graph is recorded.
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
        with torch.set_grad_enabled(gradients):
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
        for name, inputs in inputs_of(model, left, batch, taken=_Numbers()).items():
            by_input.setdefault(tuple(inputs), []).append(name)
            del left[name]
        stages += [Stage(tuple(names), len(key)) for key, names in by_input.items()]
        if not left:
            break
    return stages


class _Numbers:
    """A number for every tensor, and its version: one that was changed in place has another. Keeps none alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def __call__(self, x: Tensor) -> tuple[int, int]:
        known = self._known.get(id(x))
        if known is None or known[0]() is not x:
            self._count += 1
            known = self._known[id(x)] = (weakref.ref(x), self._count)
        return known[1], 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Readout:
    """What a model puts out for a batch, (tokens, features), or what its last layer makes it of, if that is smaller.

    Attributes:
        values: the outputs, or the inputs of `head`.
        head: the name of the linear layer whose outputs, as they are, are the model's; None if `values` are them.
        is_logits: whether the outputs stand for answers, one feature for each.
        features: of the outputs.
    """

    values: Tensor
    head: str | None
    is_logits: bool
    features: int


@torch.no_grad()
def readout(model: nn.Module, batch: Batch) -> Readout:
    """Run a model, and keep what its outputs can be computed of."""
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    calls = dict.fromkeys(linears, 0)
    last: dict[str, Any] = {}

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        last.update(name=name, x=args[0] if args else None, output=weakref.ref(output), version=output._version)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
        for name, module in linears.items()
    ]
    try:
        result = call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    output = output_of(result)
    features = output.shape[-1] if output.dim() else 1
    is_logits = hasattr(result, "logits") and features > 1
    is_large = features >= LARGE and last and calls[last["name"]] == 1 and last["x"] is not None
    if is_large and _is_untouched(output, last["output"](), last["version"]):
        return Readout(tokens_of(batch, last["x"]), last["name"], is_logits, features)
    return Readout(tokens_of(batch, output), None, is_logits, features)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Linear) or is_conv1d(module)


def _is_untouched(tensor: Tensor, output: Tensor | None, version: int) -> bool:
    """Whether a tensor is a layer's output, unchanged since."""
    return output is not None and (
        tensor.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (output.shape, output.stride(), output.dtype)
        and tensor._version == version
    )


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

            def note(name: str, output: Tensor, made: dict[Any, str] = made) -> Tensor:
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
