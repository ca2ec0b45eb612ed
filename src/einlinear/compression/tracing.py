"""Dependence of a model's output on its layers: which layers it needs, and which layer computes it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.activations import hooked, layer_inputs, output_of, tokens_of
from einlinear.nn import Linear
from einlinear.nn.layer_kinds import is_conv1d
from einlinear.nn.model_call import Batch, call

# outputs with so many features are computed again, slice by slice, rather than kept
LARGE = 2**12
# calls without a gradient after which the output counts as independent of a layer
_CALLS = 2
# nodes of autograd's graph behind which a model's output is still that of its last layer
_SAME = {
    *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze"),
    *("Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    *("LogSoftmax", "Sigmoid", "Softmax"),
}


@dataclass(frozen=True)
class ModelOutput:
    """Output of a model for a batch, (tokens, features), or the inputs of its last layer where these are smaller.

    Attributes:
        values: the output, or the inputs of `head`.
        head: name of the linear layer whose output is the model's; None if `values` are the output.
        is_logits: whether the output holds logits, one feature for each class.
        features: of the output.
    """

    values: Tensor
    head: str | None
    is_logits: bool
    features: int


@torch.no_grad()
def model_output(model: nn.Module, batch: Batch) -> ModelOutput:
    """Run a model, and keep its output or the smaller tensor from which its head computes the output."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Linear) or is_conv1d(module)
    }
    calls = dict.fromkeys(linears, 0)
    last: dict[str, Any] = {}

    def record(name: str, x: Any, output: Tensor) -> None:
        calls[name] += 1
        last.update(name=name, x=x, output=weakref.ref(output), version=output._version)

    with hooked(linears, record):
        result = call(model, batch)
    output = output_of(result)
    features = output.shape[-1] if output.dim() else 1
    is_logits = hasattr(result, "logits") and features > 1
    is_large = features >= LARGE and last and calls[last["name"]] == 1
    if is_large and _is_unchanged(output, last["output"](), last["version"]):
        return ModelOutput(tokens_of(batch, last["x"]), last["name"], is_logits, features)
    return ModelOutput(tokens_of(batch, output), None, is_logits, features)


def _is_unchanged(tensor: Tensor, output: Tensor | None, version: int) -> bool:
    """Return whether a tensor is a layer's output, unchanged since."""
    return output is not None and (
        tensor.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (output.shape, output.stride(), output.dtype)
        and tensor._version == version
    )


def head_inputs(model: nn.Module, head: str, batch: Batch, gradients: bool = False) -> Tensor:
    """Return the inputs of a model's head, (tokens, features)."""
    layers = {head: model.get_submodule(head)}
    keep = (lambda x: x) if gradients else Tensor.clone
    ((x,),) = layer_inputs(model, layers, batch, {head: 1}, keep, gradients).values()
    return tokens_of(batch, x)


@dataclass(frozen=True)
class Trace:
    """Use of a model's layers on calibration data.

    Attributes:
        called: the layers that get at least one token.
        reached: those of them that the model's output depends on.
        last: those whose output is the model's, up to a softmax, a sigmoid or a change of shape.
    """

    called: frozenset[str]
    reached: frozenset[str]
    last: frozenset[str]


def trace_layers(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> Trace:
    """Find out which layers the model's output depends on, by the gradients of their outputs."""
    reached, last, calls = set[str](), set[str](), dict.fromkeys(layers, 0)
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        for batch in batches:
            left = {name: layer for name, layer in layers.items() if name not in reached and calls[name] < _CALLS}
            if not left:
                break
            # layers by the graph's node of their output
            nodes: dict[Any, str] = {}

            def record(name: str, _: Any, output: Tensor, nodes: dict[Any, str] = nodes) -> Tensor:
                if not output.numel():
                    return output
                calls[name] += 1
                output.requires_grad_().register_hook(lambda _: reached.add(name))
                # a clone: an operation in place would change the node
                result = output.clone()
                nodes[result.grad_fn] = name
                return result

            with torch.enable_grad(), hooked(left, record):
                output = output_of(call(model, batch))
                if output.requires_grad:
                    last |= _sources(output.grad_fn, nodes)
                    # of many logits only the sum is kept: their gradient takes as much memory as they do
                    total = output.sum(dtype=torch.float32)
                    del output
                    total.backward()
    finally:
        for p in learning:
            p.requires_grad_()
    called = frozenset(name for name, count in calls.items() if count)
    return Trace(called, frozenset(reached), frozenset(last))


def _sources(node: Any, nodes: Mapping[Any, str]) -> set[str]:
    """The layers whose outputs a tensor consists of, by its node in the graph."""
    sources = set[str]()
    left = [node]
    while left:
        node = left.pop()
        if node in nodes:
            sources.add(nodes[node])
        elif node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in _SAME:
            left += [function for function, _ in node.next_functions]
    return sources
