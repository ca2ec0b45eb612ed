"""Inputs and outputs of a model and of its layers on calibration data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.nn.model_call import Batch, call


class StopForward(Exception):
    """Raised inside a hook: the rest of the model need not run."""


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, Any, Any], Any], before: bool = False
) -> Iterator[None]:
    """Call `hook(name, input, output)` for every call of a module; the block ends where a hook raises `StopForward`.

    Args:
        modules: by name.
        hook: what it returns replaces the output; None: the output stays.
        before: the hook runs before the module, and its output is None.
    """

    def register(name: str, module: nn.Module) -> Any:
        def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            return hook(name, args[0] if args else next(iter(kwargs.values()), None), output)

        if before:
            return module.register_forward_pre_hook(run, with_kwargs=True)
        return module.register_forward_hook(run, with_kwargs=True)

    handles = [register(name, module) for name, module in modules.items()]
    try:
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    calls: Mapping[str, int] | None = None,
    keep: Callable[[Tensor], Any] = Tensor.clone,
    gradients: bool = False,
) -> dict[str, list[Any]]:
    """Return the inputs of layers, call by call, in the order in which the layers are first called.

    Args:
        model, batch: see `einlinear.nn.model_call.call`.
        layers: by name.
        calls: how often each layer is called: the model stops once all were.
        keep: what to keep of an input: by default a copy, since the model may change it in place afterwards.
        gradients: whether autograd records the graph.
    """
    inputs: dict[str, list[Any]] = {}

    def record(name: str, x: Tensor, _: None) -> None:
        inputs.setdefault(name, []).append(keep(x))
        if calls is not None and all(len(inputs.get(layer, ())) >= count for layer, count in calls.items()):
            raise StopForward

    with hooked(layers, record, before=True), torch.set_grad_enabled(gradients):
        call(model, batch)
    return inputs


def output_of(result: Any) -> Tensor:
    """Return the tensor that counts in a model's result: logits, the last hidden state, or else the first tensor.

    Logits of one shape, such as those of the start and the end of an answer, are stacked. A loss does not count.

    Raises:
        ValueError: the result holds no tensor.
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
    raise ValueError(f"the model returns a {type(result).__name__}, which holds no tensor")


def tokens_of(batch: Batch, tensor: Tensor) -> Tensor:
    """Return an input or output as (tokens, features), without the padding that an attention mask names."""
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != len(flat):
        return flat
    if tensor.dim() <= 2 or tensor.shape[:-1] == mask.shape:
        return flat[mask.flatten().to(flat.device, torch.bool)]
    return flat


@dataclass(frozen=True)
class Stage:
    """Layers that read the same input, such as the projections to queries, keys and values.

    Each is called `calls` times in one forward pass.
    """

    names: tuple[str, ...]
    calls: int


def stages_of(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> list[Stage]:
    """Return the layers that the data reach, in the order of their calls. Mostly the first batch reaches all."""
    stages: list[Stage] = []
    left = dict(layers)
    for batch in batches:
        by_input: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for name, inputs in layer_inputs(model, left, batch, keep=_TensorIdentity()).items():
            by_input.setdefault(tuple(inputs), []).append(name)
            del left[name]
        stages += [Stage(tuple(names), len(key)) for key, names in by_input.items()]
        if not left:
            break
    return stages


class _TensorIdentity:
    """A number for every tensor, and its version, which changes in place. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def __call__(self, x: Tensor) -> tuple[int, int]:
        entry = self._numbers.get(id(x))
        if entry is None or entry[0]() is not x:
            self._count += 1
            entry = self._numbers[id(x)] = (weakref.ref(x), self._count)
        return entry[1], 0 if x.is_inference() else x._version
