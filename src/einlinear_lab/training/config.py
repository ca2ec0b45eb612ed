"""Config of the training of one model, whatever the model and its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from einlinear.mup.scaling_rules import DECAYS
from einlinear.schedules import SCHEDULES
from einlinear_lab.training.metrics import TRACKERS

_CHOICES = {
    "decay": DECAYS,
    "optimizer": ("adamw", "adam", "sgd", "muon"),
    "schedule": SCHEDULES,
    "precision": ("float32", "bfloat16", "float16"),
    "parallel": ("ddp", "fsdp", "experts"),
    "tracker": (None, *TRACKERS),
    "device": ("cpu", "cuda"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Config of the training of one model.

    Attributes:
        steps: number of optimizer steps.
        lr: learning rate of the dense base model; muP transfers it.
        optimizer: "adamw", "adam", "sgd" (momentum 0.9), or "muon" (for the matrices in the model's `blocks`, or all
            matrices of a model without `blocks`; AdamW for the rest).
        product: whether Muon moves the two factors of a term together, see `param_groups`.
        betas: of Adam.
        weight_decay, decay: of matrices and embeddings, and whether it is "independent" of learning rates or "coupled"
            to those of groups, see `param_groups`.
        eps: of Adam for gradients of the dense base model, see `param_groups`; None: torch's 1e-8 for all parameters.
        schedule: "constant", "cosine" or "linear", after the warm-up.
        warmup: steps over which the learning rate rises from zero.
        final_lr: final learning rate of cosine and linear, as a fraction of lr.
        clip: maximum norm of the gradient of all parameters; None does not clip.
        accumulate: micro-batches per batch, to save memory.
        precision: "float32" or, with autocast, "bfloat16" or "float16".
        compile: whether to compile the model with torch.compile.
        parallel: how several processes share the model: "ddp" (replicated), "fsdp" (sharded) or "experts" (replicated,
            but the experts of mixtures are sharded).
        guide_until: number of steps with self-guided training (Wei et al., arXiv 2406.16450): every structured layer
            has a dense guide, whose share of the output falls to 0 along a cosine. None: no guides.
        densify_at: step after which structured layers become dense layers with the same weights (sparse-to-dense of Dao
            et al., arXiv 2204.00595). The optimizer keeps its state of all other parameters. None: never.
        moe_loss: weight of `einlinear.moe_loss` in the objective, for mixtures of experts. Logged losses exclude it.
            With `accumulate` the load is that of each micro-batch.
        structure_aware: False is the control: factors have the learning rate of a dense layer.
        log_every, evaluate_every, checkpoint_every: intervals in steps; None: only at the end.
        tracker: "tensorboard", "wandb" or "mlflow", which also receives the metrics.
        device: "cpu" or "cuda".
        threads: CPU threads; None leaves torch's number.

    Raises:
        ValueError: an unknown name, a number out of range, or options that cannot be combined.

    Example:
        >>> from einlinear_lab.training import TrainingConfig
        >>> config = TrainingConfig(steps=1000, lr=3e-3, warmup=100, final_lr=0.1, precision="bfloat16")
        >>> config.optimizer, config.schedule
        ('adamw', 'cosine')
    """

    steps: int
    lr: float = 3e-3
    optimizer: str = "adamw"
    product: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    decay: str = "independent"
    eps: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    final_lr: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    parallel: str = "ddp"
    guide_until: int | None = None
    densify_at: int | None = None
    moe_loss: float = 0.01
    structure_aware: bool = True
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    tracker: str | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(str, choices))}, not {getattr(self, name)!r}")
        for name in ("steps", "accumulate", "log_every", "evaluate_every", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        steps = f"below the {self.steps} steps"
        for name, is_allowed, allowed in (
            ("warmup", 0 <= self.warmup < self.steps, f"from 0 to {steps}"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("final_lr", 0 <= self.final_lr <= 1, "a share of lr, from 0 to 1"),
            ("moe_loss", 0 <= self.moe_loss < math.inf, "zero or a positive number"),
            ("eps", self.eps is None or 0 < self.eps < math.inf, "a positive number, or None"),
            ("clip", self.clip is None or self.clip > 0, "positive, or None"),
            ("guide_until", self.guide_until is None or 0 < self.guide_until < self.steps, f"from 1 to {steps}"),
            ("densify_at", self.densify_at is None or 0 < self.densify_at < self.steps, f"from 1 to {steps}"),
        ):
            if not is_allowed:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)}")
        for name in ("guide_until", "densify_at"):
            if getattr(self, name) is not None and self.parallel != "ddp":
                raise ValueError(f"{name} needs whole layers, which {self.parallel} divides among processes: take ddp")
        if self.product and self.optimizer != "muon":
            raise ValueError(f"product=True needs optimizer='muon', not {self.optimizer!r}")
        if self.guide_until is not None and self.densify_at is not None and self.densify_at < self.guide_until:
            raise ValueError(f"densify_at={self.densify_at} must be at least guide_until, {self.guide_until}")
        if self.precision == "float16" and self.parallel != "ddp":
            raise ValueError(f"float16 needs scaled gradients, which {self.parallel} does not support: take bfloat16")
