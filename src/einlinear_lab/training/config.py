"""What can be set about training a model, whatever the model and its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from einlinear.mup.schedule import SCHEDULES
from einlinear_lab.training.trackers import TRACKERS

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
PRECISIONS = ("float32", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp", "experts")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one model is trained.

    Attributes:
        steps: of the optimizer.
        lr: learning rate of the dense base model; muP carries it over.
        optimizer: "adamw", "adam", "sgd" (with momentum 0.9), or "muon" (for the matrices in the model's `blocks`, or
            all where it has none; AdamW for the rest).
        betas: of Adam.
        weight_decay: of matrices and embeddings, see `param_groups`.
        schedule: "constant", "cosine" or "linear", after the warm-up.
        warmup: steps over which the learning rate rises from zero.
        final_lr: what cosine and linear end at, as a share of lr.
        clip: largest norm of the gradient of all parameters; None does not clip.
        accumulate: parts of a batch that are computed one after the other, to save memory.
        precision: of the arithmetic, "float32" or, by autocast, "bfloat16" or "float16".
        compile: whether torch.compile compiles the model.
        parallel: how several processes share the model: "ddp" (each has all of it), "fsdp" (each has a part) or
            "experts" (each has all but the experts of mixtures, and a part of these).
        guide_until: for so many steps every structured layer has a dense weight beside it, which starts as its own and
            hands over to it along a cosine (self-guided training of Wei et al., arXiv 2406.16450; `nn/guided.py`).
            Until then a step costs what a dense model's does on top. None: no guides.
        densify_at: after so many steps structured layers become the dense ones that compute the same, and training
            goes on (sparse-to-dense of Dao et al., arXiv 2204.00595, after 90 % of the steps); None: never. The
            optimizer keeps what it knows of all other parameters.
        moe_loss: weight of `einlinear.moe_loss` in what is minimised, for models with mixtures of experts. Losses that
            are written down are without it. With `accumulate` the load is that of every part of a batch by itself.
        structure_aware: False is the control: factors learn at the rate of a dense layer.
        log_every, evaluate_every, checkpoint_every: in steps; None: at the end only.
        tracker: "tensorboard", "wandb" or "mlflow", which then get the metrics as well.
        device: "cpu" or "cuda".
        threads: of the CPU; None leaves torch's.

    Raises:
        ValueError: an unknown name, a number out of range, settings that do not go together.

    Example:
        >>> from einlinear_lab.training import Training
        >>> config = Training(steps=1000, lr=3e-3, warmup=100, final_lr=0.1, precision="bfloat16")
        >>> config.optimizer, config.schedule
        ('adamw', 'cosine')
        >>> Training(steps=1000, schedule="step")
        Traceback (most recent call last):
            ...
        ValueError: schedule must be constant or cosine or linear, not 'step'
    """

    steps: int
    lr: float = 3e-3
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
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
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
            ("tracker", (None, *TRACKERS)),
            ("device", ("cpu", "cuda")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(str, known))}, not {getattr(self, name)!r}")
        for name in ("steps", "accumulate", "log_every", "evaluate_every", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to below the {self.steps} steps, not {self.warmup}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a share of lr, from 0 to 1, not {self.final_lr}")
        if not 0 <= self.moe_loss < math.inf:
            raise ValueError(f"moe_loss must be zero or a positive number, not {self.moe_loss}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None, not {self.clip}")
        for name in ("guide_until", "densify_at"):
            value = getattr(self, name)
            if value is not None and not 0 < value < self.steps:
                raise ValueError(f"{name} must be from 1 to below the {self.steps} steps, not {value}")
            if value is not None and self.parallel != "ddp":
                raise ValueError(
                    f"{name} needs whole layers, of which {self.parallel} leaves each process a part: take ddp"
                )
        if self.guide_until is not None and self.densify_at is not None and self.densify_at < self.guide_until:
            raise ValueError(
                f"densify_at={self.densify_at} would make layers dense that have guides: it must be at least "
                f"guide_until, {self.guide_until}"
            )
        if self.precision == "float16" and self.parallel != "ddp":
            raise ValueError(
                f"float16 needs its gradients scaled, which {self.parallel} does not do here: take bfloat16"
            )
