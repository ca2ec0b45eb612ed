"""Distance between the outputs of a compressed model and those of the original, and between their blocks' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.activations import head_inputs, hooked, model_output, output_of, tokens_of
from einlinear.compression.divergence import mean_kl_divergence
from einlinear.nn.dense_layers import is_linear
from einlinear.nn.linear import Factored
from einlinear.nn.model_call import Batch, call
from einlinear.nn.names import full_names, plain_modules


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the blocks with linear layers in the model's outermost lists, such as transformer blocks."""
    lists: list[str] = []
    names: list[str] = []
    for name, module in plain_modules(model, remove_duplicate=True):
        # the model itself may be a list of whole models
        if not name or not isinstance(module, nn.ModuleList | nn.Sequential) or f"{name}.".startswith(tuple(lists)):
            continue
        found = [f"{name}.{key}" for key, block in module.named_children() if _holds_linear_layers(block)]
        if found:
            lists.append(f"{name}.")
            names += found
    return names


def _holds_linear_layers(block: nn.Module) -> bool:
    return any(is_linear(module) or isinstance(module, Factored) for module in block.modules() if module is not block)


class DistillationLoss:
    """Distance between the outputs of two models. A head's logits are held for the trained model only."""

    def __init__(
        self, model: nn.Module, original: nn.Module, matched: Sequence[str], task_loss: float, must_match: bool
    ) -> None:
        self._model, self._original, self._matched, self._task_loss = model, original, matched, task_loss
        self._must_match = must_match
        # by name without prefixes of wrappers
        self._full_names = {id(m): full_names(m) for m in (model, original)}
        # the layer that computes the logits of both models, if they are many, or ""; looked up with the first batch
        self._head: str | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self._head is None:
            self._head = self._find_head(batch)
        with torch.no_grad():
            target, targets = self._run(self._original, batch)
        result, outputs = self._run(self._model, batch)
        loss = self._output_loss(result, target, batch)
        pairs = [pair for name in self._matched for pair in zip(outputs[name], targets[name])]
        if self._must_match and not pairs:
            raise ValueError(f"match: {', '.join(self._matched)} is never called or returns no tensor")
        for output, of_original in pairs:
            loss = loss + _relative_squared_error(output, of_original, batch)
        if self._task_loss:
            if getattr(result, "loss", None) is None:
                raise ValueError("task_loss needs batches with labels, and a model that returns a loss for them")
            loss = loss + self._task_loss * result.loss
        return loss

    def _find_head(self, batch: Batch) -> str:
        """Return the head of both models, before which they can stop; "" if they have to run to their ends."""
        if self._task_loss:
            return ""
        target = model_output(self._original, batch)
        is_matched = any(
            f"{target.head}.".startswith(f"{self._full_names[id(self._original)][n]}.") for n in self._matched
        )
        if is_matched or not (target.head and target.is_logits):
            return ""
        return target.head if model_output(self._model, batch).head == target.head else ""

    def _run(self, model: nn.Module, batch: Batch) -> tuple[Any, dict[str, list[Tensor]]]:
        """Return the model's result, or the inputs of its head, and the outputs of the matched modules by call."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self._matched}

        def record(name: str, _: Any, output: Any) -> None:
            # a module without a tensor in its output
            with suppress(ValueError):
                outputs[name].append(output_of(output))

        with hooked({name: model.get_submodule(self._full_names[id(model)][name]) for name in self._matched}, record):
            if not self._head:
                return call(model, batch), outputs
            return head_inputs(model, self._head, batch, gradients=torch.is_grad_enabled()), outputs

    def _output_loss(self, result: Any, target: Any, batch: Batch) -> Tensor:
        if self._head:
            head = self._original.get_submodule(self._head)
            logits: Tensor = self._model.get_submodule(self._head)(result)
            return mean_kl_divergence(logits, lambda part: head(target[part]), in_place=True)
        x, y = output_of(result), output_of(target)
        if not hasattr(target, "logits"):
            return _relative_squared_error(x, y, batch)
        x, y = tokens_of(batch, x), tokens_of(batch, y)
        # one feature: a regression
        if y.shape[-1] == 1:
            return F.mse_loss(x.float(), y.float()) / y.float().var().clamp_min(1e-12)
        return mean_kl_divergence(x, lambda part: y[part])


def _relative_squared_error(output: Tensor, target: Tensor, batch: Batch) -> Tensor:
    x, y = tokens_of(batch, output).float(), tokens_of(batch, target).float()
    return (x - y).square().mean() / (y - y.mean(0)).square().mean().clamp_min(1e-12)
