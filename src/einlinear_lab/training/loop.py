"""The training loop. Every step is a function of its number, so that resuming is exact."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from einlinear import checkpoint
from einlinear.checkpoint import Checkpoint
from einlinear.conversion import densify
from einlinear.mup import param_groups
from einlinear.mup.base_model import Base
from einlinear.mup.coordinate_check import TrainingBatch
from einlinear.mup.muon import Muon
from einlinear.nn.moe import Mixture, moe_loads, moe_loss
from einlinear.nn.names import name_of
from einlinear.schedules import lr_factor
from einlinear_lab.training import distributed
from einlinear_lab.training.allocator import freed_memory_kept
from einlinear_lab.training.config import TrainingConfig
from einlinear_lab.training.distributed import World
from einlinear_lab.training.guided import guide, set_share, unguide
from einlinear_lab.training.metrics import Metrics, check_installed, open_tracker

T = TypeVar("T")
# Called with (step, number of steps, loss).
Progress = Callable[[int, int, float], None]
# Yields (step, number of steps, loss) after every step, and returns a result.
Steps: TypeAlias = Generator[tuple[int, int, float], None, T]


class Task(Protocol):
    """Training task: data, loss and metrics. METRICS_TO_MINIMISE are the metrics where lower is better."""

    METRICS_TO_MINIMISE: ClassVar[tuple[str, ...]]

    def batch(self, step: int) -> TrainingBatch:
        """Return the batch of all processes; it depends on the step alone."""

    def loss(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        """Return the mean loss of a batch or micro-batch."""

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return the metrics of a model by name, always on the same data."""


@dataclass(frozen=True)
class Outcome:
    """Result of a training.

    Attributes:
        losses: of every step; the last one is NaN or infinite if the training diverged.
        metrics: of the final model, by name.
        step_seconds: median duration of a step, without data loading, evaluation and compilation.
        memory: bytes on the device of this process. On a GPU, the peak of torch's tensors, None if no step was left to
            make. On a CPU, parameters, gradients and optimizer state, without activations.
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
    config: TrainingConfig,
    folder: Path | None = None,
    *,
    lr_scale: Mapping[str, float] | None = None,
    alpha: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train a model; under torchrun, with all processes.

    Args:
        model: initialised, the same on every process; trained in place. Guides are removed even after an error.
        base, lr_scale, alpha: as for `param_groups`.
        task: batches, loss and metrics.
        config: of the training.
        folder: for metrics.jsonl and the checkpoints from which an interrupted run resumes. None writes no files.
        metadata: JSON values that identify the run. A checkpoint with other metadata is refused.
        progress: called after every step, on rank 0 only.

    Raises:
        ValueError: the device does not exist; the folder holds a checkpoint of another run, or processes find different
            ones; a batch that does not divide equally; a tracker without a folder; guides that `guide` refuses.
        ModuleNotFoundError: the tracker's package is not installed.
        OSError: the folder cannot be written, or its disk is full. Earlier checkpoints remain.

    Example:
        >>> import einlinear as el
        >>> from einlinear_lab.data import Teacher
        >>> from einlinear_lab.models import ResidualMLP
        >>> from einlinear_lab.training import TrainingConfig, train
        >>> from einlinear_lab.training.tasks import Regression
        >>> model = ResidualMLP(8, 64, 1, structure="btt")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> task = Regression(Teacher(8, width=32, depth=2), batch_size=64, seed=0)
        >>> outcome = train(model, base=ResidualMLP(8, 32, 1), task=task, config=TrainingConfig(steps=20))
        >>> len(outcome.losses), list(outcome.metrics)
        (20, ['test_loss'])
        >>> outcome.losses[-1] < outcome.losses[0]
        True
    """
    steps = train_in_steps(model, base, task, config, folder, lr_scale=lr_scale, alpha=alpha, metadata=metadata)
    return finish(steps, progress)


def finish(steps: Steps[T], progress: Progress | None = None) -> T:
    """Make all steps and return the result; call `progress` after every step, on rank 0 only."""
    with closing(steps):
        while True:
            try:
                report = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            if progress is not None and distributed.is_first():
                progress(*report)


def train_in_steps(
    model: nn.Module,
    base: Base,
    task: Task,
    config: TrainingConfig,
    folder: Path | None = None,
    *,
    lr_scale: Mapping[str, float] | None = None,
    alpha: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Steps[Outcome]:
    """Train a model as `train` does, a step at a time, so that several trainings can take turns in one process."""
    if config.tracker:
        check_installed(config.tracker)
        if folder is None:
            raise ValueError(f"tracker={config.tracker!r} needs a folder, from which an interrupted run resumes")
    distributed.check_device(config.device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        world = distributed.world(config.device)
        with freed_memory_kept():
            return (
                yield from _Run(model, base, task, config, folder, lr_scale, alpha, dict(metadata or {}), world).train()
            )
    finally:
        if config.guide_until is not None:
            unguide(model)
        torch.set_num_threads(threads)


@dataclass
class _Run:
    plain: nn.Module
    base: Base
    task: Task
    config: TrainingConfig
    folder: Path | None
    lr_scale: Mapping[str, float] | None
    alpha: float
    metadata: dict[str, Any]
    world: World
    # Of every step, those before an interruption included.
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    # Whether the next step would compile.
    is_cold: bool = True

    def __post_init__(self) -> None:
        self.plain.to(self.world.device)
        if self.config.guide_until is not None:
            guide(self.plain)
        self._set_up()
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.config.precision == "float16")
        self.on_gpu = self.world.device.type == "cuda"

    def _set_up(self) -> None:
        """Wrap the model and make the optimizer, for its current parameters."""
        config = self.config
        blocks: Any = getattr(self.plain, "blocks", None)
        of_muon = config.optimizer == "muon" and blocks is not None
        self.model = distributed.wrap(self.plain, config.parallel, self.world)
        groups = param_groups(
            self.model,
            config.lr,
            base=self.base,
            optimizer=config.optimizer,
            product=config.product,
            weight_decay=config.weight_decay,
            decay=config.decay,
            eps=config.eps,
            alpha=self.alpha,
            structure_aware=config.structure_aware,
            lr_scale=self.lr_scale,
            hidden=f"{name_of(self.plain, blocks)}.*" if of_muon else None,
        )
        self.optimizer = _optimizer(groups, config)
        self.mixtures = any(isinstance(module, Mixture) for module in self.plain.modules())
        if self.mixtures and config.densify_at is not None:
            raise ValueError("densify_at makes layers dense, which mixtures of experts cannot be made")
        self.forward: Any = torch.compile(self.model) if config.compile else self.model
        self.is_cold = True

    def train(self) -> Steps[Outcome]:
        self._resume()
        final, training_seconds = dict[str, float](), sum(self.seconds)
        with self._metrics() as metrics:
            for step in range(len(self.losses) + 1, self.config.steps + 1):
                self._change_layers(step - 1)
                loss = self._step(step - 1)
                training_seconds += self.seconds[-1]
                diverged = not math.isfinite(loss)
                is_last = step == self.config.steps or diverged
                if _is_due(step, self.config.log_every) or is_last:
                    lr = self._lr(step - 1)
                    metrics.write(step, training_seconds=training_seconds, train_loss=loss, lr=lr, **self._loads())
                if _is_due(step, self.config.evaluate_every) or is_last:
                    final = self._evaluate()
                    metrics.write(step, training_seconds=training_seconds, **final)
                # After the metrics: a resumed run does not write those of earlier steps.
                if not diverged and (_is_due(step, self.config.checkpoint_every) or is_last):
                    self._save()
                yield step, self.config.steps, loss
                if self.config.threads is not None:
                    # Another training may have had a turn.
                    torch.set_num_threads(self.config.threads)
                if diverged:
                    break
        seconds = statistics.median(self.seconds)
        return Outcome(tuple(self.losses), final or self._evaluate(), seconds, self._memory())

    def _change_layers(self, step: int) -> None:
        """Remove guides and densify layers if they end after this step; other parameters keep their state."""
        for end, change in ((self.config.guide_until, unguide), (self.config.densify_at, densify)):
            if step != end:
                continue
            state = self.optimizer.state
            by_name = {name: state[p] for name, p in self.plain.named_parameters() if p in state}
            change(self.plain)
            self._set_up()
            kept: dict[Tensor, Any] = {p: by_name[name] for name, p in self.plain.named_parameters() if name in by_name}
            self.optimizer.state.update(kept)

    def _step(self, index: int) -> float:
        """Make an optimizer step and return the mean loss of its batch."""
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(index) * group["lr_mult"]
        if self.config.guide_until is not None and index < self.config.guide_until:
            set_share(self.plain, lr_factor("cosine", index, self.config.guide_until))
        batch = self.task.batch(index)
        distributed.check_batch(len(batch[0]), self.world.size, self.config.accumulate)
        x, y = map(self.world.share, batch)
        if self.is_cold:
            self._warm_up(x, y)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.world.device)
        began = time.perf_counter()
        total = self._backward(x, y)
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            distributed.clip_gradients(self.model, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Waits for the device.
        self.losses.append(self.world.mean(total))
        self.seconds.append(time.perf_counter() - began)
        if self.on_gpu:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(self.world.device))
        return self.losses[-1]

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the gradients of a batch, in micro-batches, and return its mean loss on this process."""
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        micro_batches = list(zip(x.chunk(self.config.accumulate), y.chunk(self.config.accumulate), strict=True))
        for i, (inputs, targets) in enumerate(micro_batches, 1):
            with distributed.accumulating(self.model, more=i < len(micro_batches)):
                with self._autocast():
                    loss = self.task.loss(self.forward, (inputs.to(total.device), targets.to(total.device)))
                total += loss.detach() / len(micro_batches)
                if self.mixtures:
                    # A loss that is not finite ends the run on all processes, so it is not checked here.
                    loss = loss + self.config.moe_loss * moe_loss(self.model, group=self.world.group, check=False)
                self.scaler.scale(loss / len(micro_batches)).backward()
        return total

    def _warm_up(self, x: Tensor, y: Tensor) -> None:
        """Compile kernels and model outside of the measured time, by a step without effect."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            self._backward(x, y)
        for buffer, value in buffers:
            buffer.copy_(value)
        self.optimizer.zero_grad()
        self.is_cold = False

    def _memory(self) -> int | None:
        """Return `Outcome.memory`. Parameters stand for their gradients, which a resumed run may not have yet."""
        if self.on_gpu:
            return self.peak
        parameters = list(self.model.parameters())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*parameters, *(p for p in parameters if p.requires_grad), *filter(torch.is_tensor, states)]
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    def _loads(self) -> dict[str, float]:
        """Return the expert load of this process's last micro-batch: mean entropy, and the largest share."""
        if not self.mixtures:
            return {}
        loads = moe_loads(self.model).values()
        entropy = statistics.mean(load.entropy for load in loads)
        return {"moe_entropy": entropy, "moe_largest": max(load.largest for load in loads)}

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
        latest = checkpoint.latest(self.folder / "checkpoints") if self.folder else None
        self.world.check_equal(latest.step if latest else 0, f"checkpoints in {self.folder}, which all have to see")
        if self.folder is None or latest is None:
            return
        checkpoint.check_same(self.folder, latest.metadata, self.metadata)
        # Changes after the last of these steps are made when the training resumes.
        for step in range(latest.step):
            self._change_layers(step)
        distributed.restore(self.model, self.optimizer, self.scaler, latest.tensors)
        self.losses, self.seconds = (latest.tensors[name].tolist() for name in ("losses", "seconds"))

    @contextmanager
    def _metrics(self) -> Iterator[Metrics]:
        """Open the metrics; only rank 0 writes them, and only to a folder."""
        if self.folder is None or self.world.rank > 0:
            yield Metrics(None, 0)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name, start = self.config.tracker, len(self.losses)
        with open_tracker(name, self.folder, start, self.metadata) if name else nullcontext() as tracker:
            yield Metrics(self.folder / "metrics.jsonl", start, tracker)

    def _save(self) -> None:
        if self.folder is None:
            return
        # All processes take part.
        tensors = distributed.gather(self.model, self.optimizer, self.scaler)
        for name, values in (("losses", self.losses), ("seconds", self.seconds)):
            tensors[name] = torch.tensor(values, dtype=torch.float64)
        if self.world.rank == 0:
            checkpoint.save(self.folder / "checkpoints", Checkpoint(len(self.losses), tensors, self.metadata))


def _optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}
    return kinds[config.optimizer](groups, lr=config.lr, betas=config.betas, fused=True)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
