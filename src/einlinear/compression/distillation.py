"""Distillation: train a compressed model to match the outputs of the original."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.activations import head_inputs, hooked, model_output, output_of, tokens_of
from einlinear.compression.divergence import mean_kl_divergence
from einlinear.compression.resume_cache import digest_of
from einlinear.mup import param_groups
from einlinear.nn.model_call import Batch, call, evaluating
from einlinear.nn.names import as_globs, check_globs, matches_any
from einlinear.schedules import lr_factor


@dataclass(frozen=True)
class Distillation:
    """Result of a distillation: the loss at every step, and the seconds that all took."""

    losses: tuple[float, ...]
    seconds: float


def distill(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    lr: float = 3e-4,
    *,
    match: str | Sequence[str] = (),
    task_loss: float = 0.0,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    seconds: float | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    folder: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Distillation:
    """Train a compressed model towards the original's outputs, in place, at structure-aware learning rates.

    The loss is the KL divergence of the logits (Hinton et al., arXiv 1503.02531), or of other outputs the squared error
    over the variance. AdamW has linear warm-up and cosine decay; dropout is off. Parameters in bfloat16 are trained in
    float32, and rounded after every step.

    Args:
        model: compressed; its parameters that require gradients are trained.
        original: the model before the compression, which is not changed.
        batches: training data, as in `compress`; repeated if need be.
        steps: batches to train on.
        lr: learning rate of the original; structured layers get rates derived from it (`param_groups`).
        match: globs on names of modules whose outputs are matched as well, each with the weight of the model's output.
        task_loss: weight of the loss that the model itself returns, for batches with labels.
        weight_decay, clip: of AdamW; largest norm of the gradient, None for no limit.
        warmup: fraction of the steps in which the rate rises.
        seconds: time limit; the rate falls in time for it.
        progress: called after every step with the number of steps done, of all, and the loss.
        folder: for checkpoints, from which the same call resumes after an interruption. It is not removed at the end.
        checkpoint_every: seconds of training between two checkpoints.

    Raises:
        ValueError: no batches, steps or rate, a glob that matches nothing, nothing to train or in float16, parameters
            that the original shares, a folder of another distillation; or, after some training, batches that end and
            cannot be repeated, or a loss that is NaN.

    Example:
        >>> import copy, torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> original, data = copy.deepcopy(model), [torch.randn(64, 16) for _ in range(8)]
        >>> report = el.compress(model, 0.5, ["low_rank"], calibration=data)
        >>> distillation = el.distill(model, original, data, steps=97)  # so that it ends on the batch it began with
        >>> distillation.losses[-1] < distillation.losses[0]
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive, or None for no limit, not {seconds:g}")
    others = dict(original.named_modules())
    both = [name for name, _ in model.named_modules() if name in others]
    globs = as_globs(match, "match")
    check_globs(globs, both, "match", "module of both models")
    matched = [name for name in both if matches_any(name, globs)]
    optimizer = _Optimizer(model, original, lr, weight_decay)
    config = {"steps": steps, "lr": lr, "match": matched, "task_loss": task_loss, "weight_decay": weight_decay}
    config |= {"warmup": warmup, "clip": clip, "seconds": seconds}
    losses, before = list[float](), 0.0
    if folder is not None:
        config |= {"model": digest_of(model, None), "original": digest_of(original, None)}
        losses, before = optimizer.resume(Path(folder), config)
    saved = time.monotonic()
    start = saved - before
    loss_of = _Loss(model, original, matched, task_loss)
    with evaluating(model, original):
        # gradient checkpointing is on only in training mode; the modules inside stay in evaluation mode
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        for batch in islice(_endless(batches), len(losses), None):
            # a time limit moves along the schedule as well
            step = max(len(losses), 0 if seconds is None else int(steps * (time.monotonic() - start) / seconds))
            if step >= steps:
                break
            loss = loss_of(batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss is {losses[-1]} at step {len(losses)}: take a lower lr than {lr:g}")
            loss.backward()
            optimizer.step(lr_factor("cosine", step, steps, int(warmup * steps)), clip)
            if progress:
                progress(len(losses), steps, losses[-1])
            if folder is not None and time.monotonic() - saved > checkpoint_every:
                now = time.monotonic()
                optimizer.save(Path(folder), losses, {"config": config, "seconds": now - start})
                saved = time.monotonic()
                # writing takes no time off the limit
                start += saved - now
        if folder is not None:
            optimizer.save(Path(folder), losses, {"config": config, "seconds": time.monotonic() - start})
    return Distillation(tuple(losses), time.monotonic() - start)


class _Optimizer:
    """AdamW at structure-aware rates. Most steps are too small for bfloat16, whose parameters learn in float32."""

    def __init__(self, model: nn.Module, original: nn.Module, lr: float, weight_decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        if any(p.dtype == torch.float16 for p in trained.values()):
            raise ValueError("float16 parameters cannot be trained: load the model in float32 or bfloat16")
        originals = {id(p) for p in original.parameters()}
        if shared := next((name for name, p in trained.items() if id(p) in originals), None):
            raise ValueError(f"{shared} is the original's own parameter: give a deepcopy made before compressing")
        self._lr = lr
        # float32 copies of parameters in bfloat16, and the others
        self._learning = {name: p.detach().float() if p.dtype == torch.bfloat16 else p for name, p in trained.items()}
        self._rounded = {name: p for name, p in trained.items() if p is not self._learning[name]}
        learning = {id(trained[name]): p for name, p in self._learning.items()}
        groups = param_groups(model, lr, base=original, weight_decay=weight_decay)
        for group in groups:
            group["params"] = [learning.get(id(p), p) for p in group["params"]]
        self._adamw = torch.optim.AdamW(groups)

    def step(self, factor: float, clip: float | None) -> None:
        for name, p in self._rounded.items():
            self._learning[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self._learning.values(), clip)
        for group in self._adamw.param_groups:
            group["lr"] = self._lr * group["lr_mult"] * factor
        self._adamw.step()
        self._adamw.zero_grad()
        self._round()

    def save(self, folder: Path, losses: Sequence[float], metadata: Mapping[str, Any]) -> None:
        # needs safetensors, which is no dependency of the core
        from einlinear import checkpoint

        tensors: dict[str, Tensor] = {}
        for name, p in self._learning.items():
            tensors |= {f"{key}.{name}": value for key, value in {"parameter": p, **self._adamw.state[p]}.items()}
        checkpoint.save(folder, checkpoint.Checkpoint(len(losses), tensors, {**metadata, "losses": list(losses)}))

    @torch.no_grad()
    def resume(self, folder: Path, config: Mapping[str, Any]) -> tuple[list[float], float]:
        """Restore the last checkpoint, and return its losses and seconds."""
        from einlinear import checkpoint

        last = checkpoint.latest(folder)
        if last is None:
            return [], 0.0
        checkpoint.check_same(folder, last.metadata["config"], config)
        for full_name, tensor in last.tensors.items():
            key, name = full_name.split(".", 1)
            p = self._learning[name]
            if key == "parameter":
                p.copy_(tensor)
            else:
                # AdamW keeps the number of steps on the CPU
                self._adamw.state[p][key] = tensor if key == "step" else tensor.to(p.device)
        self._round()
        return list(last.metadata["losses"]), last.metadata["seconds"]

    @torch.no_grad()
    def _round(self) -> None:
        for name, p in self._rounded.items():
            p.copy_(self._learning[name])


class _Loss:
    """Distance between the outputs of two models. A head's logits are held for the trained model only."""

    def __init__(self, model: nn.Module, original: nn.Module, matched: Sequence[str], task_loss: float) -> None:
        self._model, self._original, self._matched, self._task_loss = model, original, matched, task_loss
        # the layer that computes the logits of both models, if they are many, or ""; looked up with the first batch
        self._head: str | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self._head is None:
            self._head = self._find_head(batch)
        with torch.no_grad():
            target, targets = self._run(self._original, batch)
        result, outputs = self._run(self._model, batch)
        loss = self._output_loss(result, target, batch)
        called = [name for name in self._matched if name in outputs and name in targets]
        if self._matched and not called:
            raise ValueError(f"match: {', '.join(self._matched)} is never called, so there is no output to agree on")
        for name in called:
            loss = loss + _relative_squared_error(outputs[name], targets[name], batch)
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
        is_matched = any(f"{target.head}.".startswith(f"{name}.") for name in self._matched)
        if is_matched or not (target.head and target.is_logits):
            return ""
        return target.head if model_output(self._model, batch).head == target.head else ""

    def _run(self, model: nn.Module, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """Return the model's result, or the inputs of its head, and the outputs of the matched modules."""
        outputs: dict[str, Tensor] = {}

        def record(name: str, _: Any, output: Any) -> None:
            outputs[name] = output_of(output)

        with hooked({name: model.get_submodule(name) for name in self._matched}, record):
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


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    count, before = 0, -1
    while count > before:
        before = count
        for batch in batches:
            count += 1
            yield batch
    reason = f"the batches ended after {count} steps" if count else "there are no batches to train on"
    raise ValueError(f"{reason}: give a list or a DataLoader, which start anew")
