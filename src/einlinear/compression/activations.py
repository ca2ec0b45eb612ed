"""Inputs and outputs of a model and of its layers on calibration data, and the divergence between two models' outputs.

Logits take much memory: the inputs of their layer are kept instead, and the logits computed again, slice by slice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from einlinear.nn import Linear
from einlinear.nn.layer_kinds import is_conv1d
from einlinear.nn.model_call import Batch, call, patched

# 1 MB of logits in float32
_SLICE_ENTRIES = 2**18


class _StopForward(Exception):
    """Raised inside a hook: the rest of the model need not run."""


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
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(
    model: nn.Module, batch: Batch, calls: Mapping[str, int], gradients: bool = False
) -> dict[str, list[Tensor]]:
    """Return the inputs of layers, call by call; given how often each is called, the model stops once all were."""
    inputs: dict[str, list[Tensor]] = {}

    def record(name: str, x: Tensor, _: None) -> None:
        # the model may change its own in place afterwards
        inputs.setdefault(name, []).append(x if gradients else x.clone())
        if all(len(inputs.get(layer, ())) >= calls[layer] for layer in calls):
            raise _StopForward

    layers = {name: model.get_submodule(name) for name in calls}
    with hooked(layers, record, before=True), torch.set_grad_enabled(gradients):
        call(model, batch)
    return inputs


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


def head_inputs(model: nn.Module, head: str, batch: Batch, gradients: bool = False) -> Tensor:
    """Return the inputs of a model's head, (tokens, features)."""
    return tokens_of(batch, layer_inputs(model, batch, {head: 1}, gradients)[head][0])


def slices(tokens: int, features: int, most: int = 32) -> Iterator[slice]:
    """Split tokens into slices with small outputs, but into few, since a head reads its weight for each one."""
    step = max(1, _SLICE_ENTRIES // features, tokens // most)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def mean_kl_divergence(logits: Tensor, target: Callable[[slice], Tensor], in_place: bool = False) -> Tensor:
    """Return the mean divergence from a target's slices; `in_place`, the gradient overwrites the unshared logits."""
    loss: Tensor = _MeanDivergence.apply(logits, target, in_place)  # type: ignore[no-untyped-call]
    return loss


def summed_kl_divergence(target: Tensor, logits: Tensor, gradient: Tensor | None = None, tokens: int = 1) -> Tensor:
    """Return KL(target || logits) in nats for logits of shape (tokens, classes), summed over the tokens.

    The gradient of the mean over `tokens` is written to `gradient`, which may be the logits.
    """
    total = torch.zeros((), device=logits.device)
    for part in slices(len(target), target.shape[1], len(target)):
        p, q = target[part].float().log_softmax(1), logits[part].float().log_softmax(1)
        total += F.kl_div(q, p, log_target=True, reduction="sum")
        if gradient is not None:
            gradient[part] = q.exp_().sub_(p.exp_()).div_(tokens)
    return total


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Callable[[slice], Tensor], in_place: bool) -> Tensor:
        logits = logits.detach()
        ctx.gradient = logits if in_place else torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for part in slices(len(logits), logits.shape[1]):
            total += summed_kl_divergence(target(part), logits[part], ctx.gradient[part], len(logits))
        return total / max(len(logits), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None


class Passes:
    """Repeated forward passes of a model on the same batches, which skip finished blocks, given the last one's outputs.

    Between two calls of `inputs`, only layers that were asked for before may change.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self.batches = model, batches
        # a list of blocks by name, the index of its first block that runs, and the outputs of the one before, by batch
        self._stack, self._start, self._outputs = "", 0, list[Any]()
        # lists whose blocks need more than the output of the one before
        self._unskippable = set[str]()

    def inputs(self, calls: Mapping[str, int]) -> Iterator[dict[str, list[Tensor]]]:
        """Yield the inputs of layers for every batch, call by call, given how often each is called, by name."""
        self._skip_to(calls)
        for number in range(len(self.batches)):
            yield self._layer_inputs(number, calls)

    def _layer_inputs(self, number: int, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
        with self._skipping(number):
            return layer_inputs(self._model, self.batches[number], calls)

    def _skip_to(self, calls: Mapping[str, int]) -> None:
        """Keep the outputs of the block before the first one with these layers."""
        stack, at = _position(self._model, [*calls])
        at = 0 if stack in self._unskippable else at
        if stack != self._stack or at < self._start:
            self._stack, self._start, self._outputs = stack, 0, []
        if at == self._start:
            return
        expected = layer_inputs(self._model, self.batches[0], calls)
        try:
            outputs = [self._output(number, at - 1) for number in range(len(self.batches))]
            self._start, self._outputs = at, outputs
            both = zip(tree_leaves(self._layer_inputs(0, calls)), tree_leaves(expected), strict=True)
            is_plain = all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
            is_enough = is_plain and all(torch.equal(x, y) for x, y in both)
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
            outputs.append(tree_map_only(Tensor, Tensor.clone, output))
            raise _StopForward

        block = self._model.get_submodule(f"{self._stack}.{index}")
        with self._skipping(number), hooked({self._stack: block}, record):
            call(self._model, self.batches[number])
        return outputs[0] if outputs else None

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
