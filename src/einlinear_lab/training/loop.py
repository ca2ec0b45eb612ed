"""The training loop: every step a function of its number, so that a run that is continued is the run undisturbed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from einlinear import checkpoint
from einlinear.checkpoint import Checkpoint
from einlinear.conversion import densify
from einlinear.mup import param_groups
from einlinear.mup.groups import Base
from einlinear.mup.optim import Muon
from einlinear.mup.schedule import lr_factor
from einlinear.nn.moe import Mixture, moe_loads, moe_loss
from einlinear.nn.names import name_of
from einlinear_lab.training import distributed, state, trackers
from einlinear_lab.training.config import Training
from einlinear_lab.training.distributed import World
from einlinear_lab.training.guided import guide, set_share, unguide
from einlinear_lab.training.metrics import Metrics

Batch = tuple[Tensor, Tensor]  # inputs and targets, a row per sample
Progress = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


class Task(Protocol):
    """What a model is trained to do.

    Attributes:
        ERRORS: the metrics of which less is better.
    """

    ERRORS: ClassVar[tuple[str, ...]]

    def batch(self, step: int) -> Batch:
        """The whole batch of a step: the same one whenever it is asked for."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, or of a part of one."""

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return the metrics of a model by name, on data that is always the same."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        losses: of every step; fewer than asked for where one became NaN or infinite.
        metrics: of the final model, by name.
        step_seconds: median duration of a step, without its data and without evaluation.
        memory: bytes on the device of this process. On a GPU, the most that torch's tensors took at any time of a step;
            None where no step was left to make. On a CPU parameters, their gradients and the optimizer's state, without
            activations.
    """

    losses: tuple[float, ...]
    metrics: Mapping[str, float]
    step_seconds: float
    memory: int | None

    @property
    def diverged(self) -> bool:
        return not all(map(math.isfinite, (*self.losses[-1:], *self.metrics.values())))


def train(
    model: nn.Module,
    base: Base,
    task: Task,
    config: Training,
    folder: Path | None = None,
    *,
    lr_scale: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train a model; under torchrun, with all processes.

    Args:
        model: initialised, the same on every process; trained in place. Guides are taken out again however it ends.
        base, lr_scale: as for `param_groups`.
        task: batches, loss and metrics.
        config: how.
        folder: for metrics.jsonl and checkpoints, from which a run that was interrupted goes on. None keeps nothing.
        facts: what identifies the run, as JSON. A checkpoint of a run with other facts is refused.
        progress: called after every step, by the first process only.

    Raises:
        ValueError: there is no such device; the folder holds a checkpoint of another run, or not the same ones for all
            processes; a batch that cannot be shared or divided; a tracker without a folder; no layer for a guide, or a
            mixture of experts, where guides are asked for.
        ModuleNotFoundError: the tracker's package is not installed.
        OSError: the folder cannot be written, or its disk is full. What was saved before is still there.

    Example:
        >>> import einlinear as el
        >>> from einlinear_lab.data import Teacher
        >>> from einlinear_lab.models import ResidualMLP
        >>> from einlinear_lab.training import Training, train
        >>> from einlinear_lab.training.tasks import Regression
        >>> model = ResidualMLP(8, 64, 1, structure="btt")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> task = Regression(Teacher(8, width=32, depth=2), batch_size=64, seed=0)
        >>> outcome = train(model, base=ResidualMLP(8, 32, 1), task=task, config=Training(steps=20))
        >>> len(outcome.losses), list(outcome.metrics)
        (20, ['test_loss'])
        >>> outcome.losses[-1] < outcome.losses[0]
        True
    """
    if config.tracker:
        trackers.check_installed(config.tracker)
        if folder is None:
            raise ValueError(f"tracker={config.tracker!r} needs a folder, where the run goes on if it is interrupted")
    distributed.check_device(config.device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        world = distributed.world(config.device)
        return _Run(model, base, task, config, folder, lr_scale, dict(facts or {}), world).train(progress)
    finally:
        if config.guide_until is not None:
            unguide(model)
        torch.set_num_threads(threads)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        base: Base,
        task: Task,
        config: Training,
        folder: Path | None,
        lr_scale: Mapping[str, float] | None,
        facts: dict[str, Any],
        world: World,
    ) -> None:
        self.plain, self.base, self.lr_scale = model.to(world.device), base, lr_scale
        self.task, self.config, self.facts, self.world = task, config, facts, world
        self.folder = folder
        if config.guide_until is not None:
            guide(self.plain)
        self._set_up()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.losses: list[float] = []
        self.seconds: list[float] = []  # of every step; like the losses, those before an interruption as well
        self.on_gpu = world.device.type == "cuda"
        self.peak: int | None = None  # bytes

    def _set_up(self) -> None:
        """What depends on which parameters there are."""
        config = self.config
        blocks: Any = getattr(self.plain, "blocks", None)
        of_muon = config.optimizer == "muon" and blocks is not None
        self.model = distributed.wrap(self.plain, config.parallel, self.world)
        groups = param_groups(
            self.model,
            config.lr,
            base=self.base,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            structure_aware=config.structure_aware,
            lr_scale=self.lr_scale,
            hidden=f"{name_of(self.plain, blocks)}.*" if of_muon else None,
        )
        self.optimizers = _optimizers(groups, config)
        self.mixtures = any(isinstance(module, Mixture) for module in self.plain.modules())
        if self.mixtures and config.densify_at is not None:
            raise ValueError("densify_at makes layers dense, which mixtures of experts cannot be made")
        self.forward: Any = torch.compile(self.model) if config.compile else self.model

    def _after(self, step: int) -> None:
        """Change layers after so many steps, if that is asked for."""
        if step == self.config.guide_until:
            self._change(unguide)
        if step == self.config.densify_at:
            self._change(densify)

    def _change(self, change: Callable[[nn.Module], object]) -> None:
        """Change layers; what the optimizers know of parameters that stay, stays."""
        states = {p: known for optimizer in self.optimizers for p, known in optimizer.state.items()}
        before = {name: states[p] for name, p in self.plain.named_parameters() if p in states}
        change(self.plain)
        self._set_up()
        names = {p: name for name, p in self.plain.named_parameters()}
        for optimizer in self.optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.state.update({p: before[names[p]] for p in own if names[p] in before})

    def train(self, progress: Progress | None) -> Outcome:
        self._resume()
        with self._metrics() as metrics:
            return self._train(progress, metrics)

    def _train(self, progress: Progress | None, metrics: Metrics) -> Outcome:
        first, steps = self.world.rank == 0, self.config.steps
        training_seconds, final = sum(self.seconds), dict[str, float]()
        for step in range(len(self.losses) + 1, steps + 1):
            self._after(step - 1)
            loss = self._step(step - 1)
            training_seconds += self.seconds[-1]
            if progress and first:
                progress(step, steps, loss)
            diverged = not math.isfinite(loss)
            last = step == steps or diverged
            if _due(step, self.config.log_every) or last:
                metrics.write(
                    step=step,
                    training_seconds=training_seconds,
                    train_loss=loss,
                    lr=self._lr(step - 1),
                    **self._loads(),
                )
            if _due(step, self.config.evaluate_every) or last:
                final = self._evaluate()
                metrics.write(step=step, training_seconds=training_seconds, **final)
            if diverged:
                break
            if _due(step, self.config.checkpoint_every) or last:  # after the metrics, which a resumed run relies on
                self._save()
        seconds = statistics.median(self.seconds)
        return Outcome(tuple(self.losses), final or self._evaluate(), seconds, self._memory())

    def _step(self, index: int) -> float:
        """One step of the optimizer; the mean loss of its batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self._lr(index) * group["lr_mult"]
        if self.config.guide_until is not None and index < self.config.guide_until:
            set_share(self.plain, lr_factor("cosine", index, self.config.guide_until))
        batch = self.task.batch(index)
        distributed.check_batch(len(batch[0]), self.world.size, self.config.accumulate)
        x, y = map(self.world.share, batch)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.world.device)
        began = time.perf_counter()
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        parts = list(zip(x.chunk(self.config.accumulate), y.chunk(self.config.accumulate), strict=True))
        for i, (inputs, targets) in enumerate(parts):
            with distributed.accumulating(self.model, more=i + 1 < len(parts)):
                with self._autocast():
                    own = inputs.to(self.world.device), targets.to(self.world.device)
                    loss = self.task.loss(self.forward, own)
                total += loss.detach() / len(parts)
                self.scaler.scale(self._with_moe_loss(loss) / len(parts)).backward()
        if self.config.clip is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            distributed.clip_gradients(self.model, self.config.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.losses.append(self.world.mean(total))  # waits for the device
        self.seconds.append(time.perf_counter() - began)
        if self.on_gpu:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(self.world.device))
        return self.losses[-1]

    def _memory(self) -> int | None:
        """What `Outcome.memory` is. Gradients are counted by their parameters: a run that went on may have none yet."""
        if self.on_gpu:
            return self.peak
        parameters = list(self.model.parameters())
        states = [value for own in self.optimizers for state in own.state.values() for value in state.values()]
        tensors = [*parameters, *(p for p in parameters if p.requires_grad), *filter(torch.is_tensor, states)]
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    def _with_moe_loss(self, loss: Tensor) -> Tensor:
        """The loss to minimise. One that is not finite ends the run, on all processes: nothing is checked here."""
        if not self.mixtures:
            return loss
        return loss + self.config.moe_loss * moe_loss(self.model, group=self.world.group, check=False)

    def _loads(self) -> dict[str, float]:
        """How evenly experts were used in what this process computed last: on average over mixtures, and at worst."""
        if not self.mixtures:
            return {}
        loads = moe_loads(self.model).values()
        return {
            "moe_entropy": statistics.mean(load.entropy for load in loads),
            "moe_largest": max(load.largest for load in loads),
        }

    def _lr(self, index: int) -> float:
        c = self.config
        return c.lr * lr_factor(c.schedule, index, c.steps, c.warmup, c.final_lr)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        with self._autocast():
            return self.task.evaluate(self.model, self.world.device)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = checkpoint.latest(self.folder / "checkpoints") if self.folder else None
        self.world.check_equal(found.step if found else 0, f"checkpoints in {self.folder}, which all have to see")
        if found is None:
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
            return
        assert self.folder is not None
        checkpoint.check_same(self.folder, found.facts, self.facts)
        for step in range(found.step):  # what changes after the last of them, changes when the run goes on
            self._after(step)
        state.restore(self.model, self.optimizers, self.scaler, found.tensors)
        self.losses, self.seconds = (found.tensors[name].tolist() for name in ("losses", "seconds"))

    @contextmanager
    def _metrics(self) -> Iterator[Metrics]:
        """The first process keeps them, where there is a folder."""
        if self.folder is None or self.world.rank > 0:
            yield Metrics(None, 0)
            return
        name, start = self.config.tracker, len(self.losses)
        with trackers.opened(name, self.folder, start, self.facts) if name else nullcontext() as tracker:
            yield Metrics(self.folder / "metrics.jsonl", start, tracker)

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = state.gather(self.model, self.optimizers, self.scaler)  # all processes take part
        for name, values in (("losses", self.losses), ("seconds", self.seconds)):
            tensors[name] = torch.tensor(values, dtype=torch.float64)
        if self.world.rank == 0:
            checkpoint.save(self.folder / "checkpoints", Checkpoint(len(self.losses), tensors, self.facts))


def _optimizers(groups: list[dict[str, Any]], config: Training) -> list[torch.optim.Optimizer]:
    """One, or two with Muon, which leaves what is not a hidden matrix to AdamW."""
    if config.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=config.lr, momentum=0.9)]
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    matrices = [group for group in groups if "matrix_view" in group]
    others = [group for group in groups if "matrix_view" not in group]
    found: list[torch.optim.Optimizer] = [Muon(matrices)] if matrices else []
    return [*found, kind(others, lr=config.lr, betas=config.betas, fused=True)] if others else found


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
