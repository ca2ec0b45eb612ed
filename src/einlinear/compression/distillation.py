"""Distillation: train a compressed model to match the outputs of the original."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.distillation_loss import DistillationLoss, block_names
from einlinear.compression.lora import temporary_lora
from einlinear.compression.resume_cache import digest_of
from einlinear.conversion import convert
from einlinear.files import check_folder
from einlinear.mup import Muon, param_groups
from einlinear.nn import GatedExperts, QuantizedLinear
from einlinear.nn.linear import Factored
from einlinear.nn.model_call import Batch, check_batches, evaluating, frozen
from einlinear.nn.names import full_names, matching
from einlinear.schedules import lr_factor

# the default learning rates of the optimizers
LEARNING_RATES = {"muon": 1e-3, "adamw": 3e-4}
# the parameters that are trained
TRAIN = ("all", "structured", "adapters")


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
    lr: float | None = None,
    *,
    optimizer: str = "muon",
    match: str | Sequence[str] | None = None,
    train: str = "all",
    adapter_rank: int = 16,
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
    over the variance, plus that of the outputs of each block. The learning rate has linear warm-up and cosine decay;
    dropout is off. Parameters in bfloat16 are trained in float32, and rounded after every step. Of a `QuantizedLinear`,
    only the bias is trained.

    Args:
        model: compressed; its parameters that require gradients are trained.
        original: the model before the compression, which is not changed.
        batches: training data, as in `compress`; repeated if need be.
        steps: batches to train on.
        lr: learning rate of the original; structured layers get rates derived from it (`param_groups`). None: 1e-3 for
            Muon, 3e-4 for AdamW.
        optimizer: "muon", which moves matrices and factors by `einlinear.mup.Muon` and the rest by AdamW, or "adamw".
            In as many steps, Muon comes closer.
        match: globs on names of modules whose outputs are matched as well, each with the weight of the model's output.
            None: the blocks in the model's outermost lists of blocks, such as transformer blocks. (): no module.
        train: "all" parameters; those of "structured" layers only; or of structured layers and "adapters", LoRA beside
            the dense layers, which is merged into their weights at the end. The last two save memory.
        adapter_rank: of these adapters.
        task_loss: weight of the loss that the model itself returns, for batches with labels.
        weight_decay: decoupled.
        clip: largest norm of the gradient; None for no limit.
        warmup: fraction of the steps in which the rate rises.
        seconds: time limit; the rate falls in time for it.
        progress: called after every step with the number of steps done, of all, and the loss.
        folder: for checkpoints, from which the same call resumes after an interruption; exactly, if batches come
            in the same order. It is not removed at the end.
        checkpoint_every: seconds of training between two checkpoints.

    Raises:
        TypeError: a single batch instead of several.
        ValueError: no batches, steps, rate or rank, a wrong clip, warmup or weight decay, an unknown `train` or
            `optimizer`, a glob that matches nothing, nothing to train or in float16, parameters that the original
            shares, a folder of another distillation; or, after some training, batches that end and cannot be repeated,
            or a loss that is NaN.

    Example:
        >>> import copy, torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> original, data = copy.deepcopy(model), [torch.randn(64, 16) for _ in range(8)]
        >>> report = el.compress(model, 0.5, ["low_rank"], calibration=data)
        >>> distillation = el.distill(model, original, data, steps=97)  # so that it ends on the batch it began with
        >>> distillation.losses[-1] < distillation.losses[0]
        True
    """
    check_batches(batches, "batches")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if optimizer not in LEARNING_RATES:
        raise ValueError(f"optimizer must be {' or '.join(map(repr, LEARNING_RATES))}, not {optimizer!r}")
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be the largest norm of a gradient, above 0, or None for no limit, not {clip:g}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a fraction of the steps, from 0 to below 1, not {warmup:g}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number from 0, not {weight_decay:g}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive, or None for no limit, not {seconds:g}")
    if train not in TRAIN:
        raise ValueError(f"train must be {', '.join(map(repr, TRAIN[:-1]))} or {TRAIN[-1]!r}, not {train!r}")
    if adapter_rank < 1:
        raise ValueError(f"adapter_rank must be at least 1, not {adapter_rank}")
    if folder is not None:
        check_folder(folder, "folder")
    matched = _matched_modules(model, original, match)
    config = {"steps": steps, "lr": lr, "optimizer": optimizer, "match": matched, "task_loss": task_loss}
    config |= {"weight_decay": weight_decay, "warmup": warmup, "clip": clip, "seconds": seconds}
    config |= {"train": train, "adapter_rank": adapter_rank}
    if folder is not None:
        config |= {"model": digest_of(model, None), "original": digest_of(original, None)}
    loss_of = DistillationLoss(model, original, matched, task_loss, must_match=bool(match))
    with evaluating(model, original), _trained_parameters(model, train, adapter_rank) as (trained, adapters):
        rounding = _RoundingOptimizer(model, original, trained, adapters, optimizer, lr, weight_decay)
        losses, before = ([], 0.0) if folder is None else rounding.resume(Path(folder), config)
        saved = time.monotonic()
        start = saved - before
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
            rounding.step(lr_factor("cosine", step, steps, int(warmup * steps)), clip)
            if progress:
                progress(len(losses), steps, losses[-1])
            if folder is not None and time.monotonic() - saved > checkpoint_every:
                now = time.monotonic()
                rounding.save(Path(folder), losses, {"config": config, "seconds": now - start})
                saved = time.monotonic()
                # writing takes no time off the limit
                start += saved - now
        if folder is not None:
            rounding.save(Path(folder), losses, {"config": config, "seconds": time.monotonic() - start})
    return Distillation(tuple(losses), time.monotonic() - start)


def check_match(model: nn.Module, match: str | Sequence[str] | None, batch: Batch) -> None:
    """Raise ValueError for globs that `distill` will refuse, before this model is compressed."""
    matched = _matched_modules(model, model, match)
    if match:
        loss_of = DistillationLoss(model, model, matched, task_loss=0.0, must_match=True)
        with evaluating(model), torch.no_grad():
            loss_of(batch)


def _matched_modules(model: nn.Module, original: nn.Module, match: str | Sequence[str] | None) -> list[str]:
    others = full_names(original)
    names = block_names(model) if match is None else full_names(model)
    return [*matching({name: name for name in names if name in others}, match, "match", "module of both models")]


@contextmanager
def _trained_parameters(model: nn.Module, train: str, rank: int) -> Iterator[tuple[dict[str, nn.Parameter], nn.Module]]:
    """Yield the trained parameters by name, and adapters of dense layers; meanwhile the others need no gradients."""
    structured = {id(p) for module in model.modules() if isinstance(module, Factored) for p in module.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [] if train == "all" else [p for p in trained.values() if id(p) not in structured]
    with ExitStack() as stack:
        adapters = stack.enter_context(temporary_lora(model, rank)) if train == "adapters" else {}
        trained = {name: p for name, p in trained.items() if train == "all" or id(p) in structured}
        trained |= {f"{layer}.adapter.{n}": p for layer, a in adapters.items() for n, p in a.named_parameters()}
        stack.enter_context(frozen(others))
        if not trained:
            if train == "structured":
                raise ValueError("train='structured', but no structured layer requires gradients: give train='all'")
            if any(isinstance(module, QuantizedLinear) for module in model.modules()):
                raise ValueError("quantised weights cannot be trained: distill first, then quantise")
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        yield trained, nn.ModuleList(adapters.values())


def _base(model: nn.Module, original: nn.Module) -> nn.Module:
    """Return the original, or a copy without values whose stacked experts have the names of the model's."""
    others = dict(original.named_modules())
    experts = [name for name, module in model.named_modules() if isinstance(module, GatedExperts)]
    experts = [name for name in experts if name in others and not isinstance(others[name], GatedExperts)]
    if not experts:
        return original
    base = copy.deepcopy(original, {id(p): nn.Parameter(p.detach().to("meta")) for p in original.parameters()})
    convert(base, "dense", layers=experts)
    return base


class _RoundingOptimizer:
    """Structure-aware learning rates. Most steps are too small for bfloat16, whose parameters learn in float32."""

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        trained: Mapping[str, nn.Parameter],
        adapters: nn.Module,
        optimizer: str,
        lr: float,
        weight_decay: float,
    ) -> None:
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
        groups = param_groups(model, lr, base=_base(model, original), weight_decay=weight_decay, optimizer=optimizer)
        groups += param_groups(adapters, lr, base=None, weight_decay=weight_decay, optimizer=optimizer)
        for group in groups:
            group["params"] = [learning.get(id(p), p) for p in group["params"]]
        self._optimizer = Muon(groups) if optimizer == "muon" else torch.optim.AdamW(groups)

    def step(self, factor: float, clip: float | None) -> None:
        for name, p in self._rounded.items():
            self._learning[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self._learning.values(), clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * group["lr_mult"] * factor
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._round()

    def save(self, folder: Path, losses: Sequence[float], metadata: Mapping[str, Any]) -> None:
        # needs safetensors, which is no dependency of the core
        from einlinear import checkpoint

        tensors: dict[str, Tensor] = {}
        for name, p in self._learning.items():
            tensors |= {f"{key}.{name}": value for key, value in {"parameter": p, **self._optimizer.state[p]}.items()}
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
                # the number of steps is kept on the CPU
                self._optimizer.state[p][key] = tensor if key == "step" else tensor.to(p.device)
        self._round()
        return list(last.metadata["losses"]), last.metadata["seconds"]

    @torch.no_grad()
    def _round(self) -> None:
        for name, p in self._rounded.items():
            p.copy_(self._learning[name])


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    count, before = 0, -1
    while count > before:
        before = count
        for batch in batches:
            count += 1
            yield batch
    reason = f"the batches ended after {count} steps" if count else "there are no batches to train on"
    raise ValueError(f"{reason}: give a list or a DataLoader, which start anew")
