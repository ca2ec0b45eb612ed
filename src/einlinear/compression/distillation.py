"""`distill`: a compressed model learns to do what the original does again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.cache import digest_of
from einlinear.compression.divergence import mean_divergence
from einlinear.mup import param_groups
from einlinear.nn.names import as_globs, check_globs
from einlinear_lab.pretrained.running import (
    Batch,
    call,
    evaluating,
    hooked,
    inputs_of,
    output_of,
    readout,
    tokens_of,
)

Progress = Callable[[int, int, float], None]  # steps done, of how many, the loss

_PARAMETER = "parameter"  # in checkpoints


@dataclass(frozen=True)
class Distillation:
    """What distillation did: the loss at every step, and the seconds that all took."""

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
    progress: Progress | None = None,
    folder: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Distillation:
    """Train a compressed model to put out what the original does, in place, at structure-aware learning rates.

    Parameters in bfloat16 are trained in float32, and rounded after every step.

    Of a model that puts out logits, the divergence between the two distributions is minimised (Hinton et al.,
    arXiv 1503.02531); of another, the squared error over the variance. By AdamW, at a rate that rises and falls as a
    cosine, without dropout.

    Args:
        model: compressed; what requires gradients is trained.
        original: the model that it was, which is not changed.
        batches: training data, called as in `compress`; gone through again and again if need be.
        steps: batches to train on.
        lr: that the original would be trained with; what structured layers get follows from it (`param_groups`).
        match: globs on qualified names of modules: their outputs are to agree as well, each as much as the model's.
        task_loss: the weight of the loss that the model itself returns, for batches with labels.
        weight_decay, clip: of AdamW; of the gradient's norm, None for none.
        warmup: fraction of the steps in which the rate rises.
        seconds: stop after so many; the rate falls in time for it.
        progress: called after every step with the number of steps done, of all, and the loss.
        folder: for checkpoints. After an interruption the same call goes on from the last one. It is not removed at
            the end. Needs safetensors.
        checkpoint_every: seconds of training between two of them.

    Returns:
        The losses.

    Raises:
        ValueError: no batches, steps or rate, a glob that matches nothing, nothing to train or in float16, parameters
            that are the original's own, a folder of another distillation; batches that end before the steps and
            cannot be repeated, or a loss that is NaN, and the model has then been trained so far.

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
    modules, others = dict(model.named_modules()), dict(original.named_modules())
    globs = as_globs(match, "match")
    both = [name for name in modules if name and name in others]
    check_globs(globs, both, "match", "module of both models")
    names = [name for name in both if any(fnmatchcase(name, glob) for glob in globs)]
    optimizer = _Optimizer(model, original, lr, weight_decay)
    settings = {"steps": steps, "lr": lr, "match": names, "task_loss": task_loss, "weight_decay": weight_decay}
    settings |= {"warmup": warmup, "clip": clip, "seconds": seconds}
    if folder is not None:
        settings |= {"model": digest_of(model, None), "original": digest_of(original, None)}
    losses, before = ([], 0.0) if folder is None else optimizer.read(Path(folder), settings)
    start, saved, writing = time.monotonic(), time.monotonic(), 0.0

    def spent() -> float:
        return before + time.monotonic() - start - writing

    loss_of = _Loss(model, original, names, task_loss)
    with evaluating(model, original):
        for module in model.modules():  # to be checkpointed, it has to be in training; what is inside still is not
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        for batch in islice(_endless(batches), len(losses), None):
            done = max(len(losses) / steps, 0.0 if seconds is None else spent() / seconds)
            if done >= 1:
                break
            loss = loss_of(batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss is {losses[-1]} at step {len(losses)}: take a lower lr than {lr:g}")
            loss.backward()
            optimizer.step(_factor(done, warmup), clip)
            if progress:
                progress(len(losses), steps, losses[-1])
            if folder is not None and time.monotonic() - saved > checkpoint_every:
                now = time.monotonic()
                optimizer.write(Path(folder), losses, {"settings": settings, "seconds": spent()})
                saved = time.monotonic()
                writing += saved - now
        if folder is not None:
            optimizer.write(Path(folder), losses, {"settings": settings, "seconds": spent()})
    return Distillation(tuple(losses), spent())


class _Optimizer:
    """AdamW at structure-aware rates. Most of its steps are too small for bfloat16, whose parameters learn in float32.

    Raises:
        ValueError: nothing requires gradients, or something is in float16.
    """

    def __init__(self, model: nn.Module, original: nn.Module, lr: float, weight_decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        if any(p.dtype == torch.float16 for p in trained.values()):
            raise ValueError("float16 parameters cannot be trained: load the model in float32 or bfloat16")
        others = {id(p) for p in original.parameters()}
        shared = next((name for name, p in trained.items() if id(p) in others), None)
        if shared is not None:
            raise ValueError(f"{shared} is the original's own parameter: give a deepcopy made before compressing")
        self._lr = lr
        self._learning = {name: p.detach().float() if p.dtype == torch.bfloat16 else p for name, p in trained.items()}
        self._rounded = {name: p for name, p in trained.items() if p is not self._learning[name]}
        learning = {id(trained[name]): p for name, p in self._learning.items()}
        groups = param_groups(model, lr, base=original, weight_decay=weight_decay)
        for group in groups:
            group["params"] = [learning.get(id(p), p) for p in group["params"]]
        self._adamw = torch.optim.AdamW(groups)

    def step(self, factor: float, clip: float | None) -> None:
        """With the gradients that the model has, at this fraction of the peak rates."""
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

    def write(self, folder: Path, losses: Sequence[float], facts: Mapping[str, Any]) -> None:
        """A checkpoint."""
        from einlinear import checkpoint  # needs safetensors, which is no dependency of the core

        tensors = {f"{_PARAMETER}.{name}": p.detach() for name, p in self._learning.items()}
        for name, p in self._learning.items():
            tensors |= {f"{key}.{name}": value for key, value in self._adamw.state[p].items()}
        checkpoint.save(folder, checkpoint.Checkpoint(len(losses), tensors, {**facts, "losses": list(losses)}))

    @torch.no_grad()
    def read(self, folder: Path, settings: Mapping[str, Any]) -> tuple[list[float], float]:
        """Go on from the last checkpoint: the losses and the seconds until then."""
        from einlinear import checkpoint

        found = checkpoint.latest(folder)
        if found is None:
            return [], 0.0
        checkpoint.check_same(folder, found.facts["settings"], settings)
        for full, tensor in found.tensors.items():
            key, name = full.split(".", 1)
            if key == _PARAMETER:
                self._learning[name].copy_(tensor)
            else:  # the number of steps is kept on the CPU
                device = tensor.device if key == "step" else self._learning[name].device
                self._adamw.state[self._learning[name]][key] = tensor.to(device)
        self._round()
        return list(found.facts["losses"]), found.facts["seconds"]

    @torch.no_grad()
    def _round(self) -> None:
        for name, p in self._rounded.items():
            p.copy_(self._learning[name])


@dataclass
class _Loss:
    """What is minimised. Of many logits only the trained model's are held at once, and a slice of the original's."""

    model: nn.Module
    original: nn.Module
    names: Sequence[str]  # of modules whose outputs are to agree as well
    task_loss: float
    head: str | None = None  # the linear layer that puts out the logits of both models, if they are many
    is_known: bool = False  # whether that was looked up

    def __call__(self, batch: Batch) -> Tensor:
        if not self.is_known:
            self.head, self.is_known = self._head(batch), True
        wanted, found = dict[str, Tensor](), dict[str, Tensor]()
        with torch.no_grad(), self._noting(self.original, wanted):
            right = self._run(self.original, batch)
        with self._noting(self.model, found):
            result = self._run(self.model, batch)
        loss = self._between(result, right, batch)
        called = [name for name in self.names if name in found and name in wanted]
        if self.names and not called:
            raise ValueError(f"match: {', '.join(self.names)} is never called, so there is no output to agree on")
        for name in called:
            loss = loss + _square(found[name], wanted[name], batch)
        if not self.task_loss:
            return loss
        if getattr(result, "loss", None) is None:
            raise ValueError("task_loss needs batches with labels, and a model that returns a loss for them")
        total: Tensor = loss + self.task_loss * result.loss
        return total

    def _head(self, batch: Batch) -> str | None:
        """None if the models have to be run to their ends."""
        if self.task_loss:
            return None
        right = readout(self.original, batch)
        if right.head is None or not right.is_logits or readout(self.model, batch).head != right.head:
            return None
        is_behind = any(name == right.head or right.head.startswith(f"{name}.") for name in self.names)
        return None if is_behind else right.head

    def _noting(self, model: nn.Module, outputs: dict[str, Tensor]) -> AbstractContextManager[None]:
        def note(name: str, output: Any) -> None:
            outputs[name] = output_of(output)

        return hooked({name: model.get_submodule(name) for name in self.names}, note)

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        """What the model returns, or what its head reads."""
        if self.head is None:
            return call(model, batch)
        layers, gradients = {self.head: model.get_submodule(self.head)}, torch.is_grad_enabled()
        ((x,),) = inputs_of(model, layers, batch, {self.head: 1}, lambda x: x, gradients).values()
        return tokens_of(batch, x)

    def _between(self, found: Any, right: Any, batch: Batch) -> Tensor:
        if self.head is not None:
            of_original = self.original.get_submodule(self.head)
            logits: Tensor = self.model.get_submodule(self.head)(found)
            return mean_divergence(logits, lambda part: of_original(right[part]), in_place=True)
        x, y = output_of(found), output_of(right)
        if not hasattr(right, "logits"):
            return _square(x, y, batch)
        x, y = (tokens_of(batch, tensor) for tensor in (x, y))
        if y.shape[-1] == 1:  # a regression
            return F.mse_loss(x.float(), y.float()) / y.float().var().clamp_min(1e-12)
        return mean_divergence(x, lambda part: y[part])


def _square(found: Tensor, right: Tensor, batch: Batch) -> Tensor:
    """The squared error over the variance of the features."""
    x, y = tokens_of(batch, found).float(), tokens_of(batch, right).float()
    return (x - y).square().mean() / (y - y.mean(0)).square().mean().clamp_min(1e-12)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches again and again."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ValueError("there are no batches to train on: give some, in a list or a DataLoader")
        if count == before:
            raise ValueError(f"the batches ended after {count} steps: give a list or a DataLoader, which start anew")


def _factor(done: float, warmup: float) -> float:
    """The learning rate over its peak, when a fraction of the training is done."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))
