"""Inputs and outputs of a model and of its layers on calibration data.

Logits take much memory: the inputs of their layer are kept instead, and the logits computed again, slice by slice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn import Linear
from einlinear.nn.dense_layers import is_conv1d
from einlinear.nn.model_call import Batch, call


@torch.no_grad()
def model_output(model: nn.Module, batch: Batch) -> ModelOutput:
    """Run a model, and keep its output or the smaller tensor from which its head computes the output."""
    kinds = nn.Linear, Linear
    linears = {name: layer for name, layer in model.named_modules() if type(layer) in kinds or is_conv1d(layer)}
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
    # wide outputs are computed again, slice by slice, rather than kept
    if features >= 2**12 and last and calls[last["name"]] == 1:
        of_layer = last["output"]()
        # the layer's output, unchanged since
        if of_layer is not None and output.is_set_to(of_layer) and output._version == last["version"]:
            return ModelOutput(tokens_of(batch, last["x"]), last["name"], is_logits, features)
    return ModelOutput(tokens_of(batch, output), None, is_logits, features)


@dataclass(frozen=True)
class ModelOutput:
    """Output of a model for a batch, (tokens, features), or the smaller inputs of its head, by the head's name."""

    values: Tensor
    head: str | None
    is_logits: bool
    features: int

    def values_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the values of another such model."""
        if self.head is None:
            return tokens_of(batch, output_of(call(model, batch)))
        return head_inputs(model, self.head, batch)


def head_inputs(model: nn.Module, head: str, batch: Batch, gradients: bool = False) -> Tensor:
    """Return the inputs of a model's head, (tokens, features)."""
    return tokens_of(batch, layer_inputs(model, batch, {head: 1}, gradients)[head][0])


def layer_inputs(
    model: nn.Module, batch: Batch, calls: Mapping[str, int], gradients: bool = False
) -> dict[str, list[Tensor]]:
    """Return the inputs of layers, call by call; given how often each is called, the model stops once all were."""
    inputs: dict[str, list[Tensor]] = {}

    def record(name: str, x: Tensor, _: None) -> None:
        # the model may change its own in place afterwards
        inputs.setdefault(name, []).append(x if gradients else x.clone())
        if all(len(inputs.get(layer, ())) >= calls[layer] for layer in calls):
            raise StopForward

    layers = {name: model.get_submodule(name) for name in calls}
    with hooked(layers, record, before=True), torch.set_grad_enabled(gradients):
        call(model, batch)
    return inputs


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, Any, Any], Any], before: bool = False
) -> Iterator[None]:
    """Run `hook(name, input, output)`, which may replace the output, after each call; or `before`, without output."""

    def register(name: str, module: nn.Module) -> Any:
        def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            return hook(name, args[0] if args else next(iter(kwargs.values()), None), output)

        register_hook = module.register_forward_pre_hook if before else module.register_forward_hook
        return register_hook(run, with_kwargs=True)

    handles = [register(name, module) for name, module in modules.items()]
    try:
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


class StopForward(Exception):
    """Raised inside a hook of `hooked`: the rest of the model need not run."""


def output_of(result: Any) -> Tensor:
    """Return the tensor that counts in a model's result: logits, the last hidden state, or else the first tensor."""
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(result, name, None), Tensor):
            return value
    if isinstance(result, Mapping):
        # such as those of the start and the end of an answer
        logits = [value for name, value in result.items() if name.endswith("_logits") and isinstance(value, Tensor)]
        if logits and all(value.shape == logits[0].shape for value in logits):
            return torch.stack(logits)
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise ValueError(f"the model returns a {type(result).__name__}, which holds no tensor")


def tokens_of(batch: Batch, tensor: Tensor) -> Tensor:
    """Return an input or output as (tokens, features), without the padding that an attention mask names."""
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != len(flat):
        return flat
    is_alike = tensor.dim() <= 2 or tensor.shape[:-1] == mask.shape
    return flat[mask.flatten().to(flat.device, torch.bool)] if is_alike else flat
