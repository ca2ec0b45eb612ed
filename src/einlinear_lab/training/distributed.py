"""The processes that torchrun starts: which of them this is, and how they share a model."""

from __future__ import annotations

import atexit
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from einlinear.nn.moe.parallel import expert_parallel


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All of them; None where there is one."""
        return dist.group.WORLD if self.size > 1 else None

    def share(self, x: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return x.tensor_split(self.size)[self.rank]

    def check_equal(self, value: int, what: str) -> None:
        """Raise ValueError, on every process, where this number is not the same on all of them."""
        if self.size > 1:
            found: list[int] = [0] * self.size
            dist.all_gather_object(found, value)
            if len(set(found)) > 1:
                raise ValueError(f"the processes found different {what}: {', '.join(map(str, found))}")

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all processes."""
        value = value.detach().double()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size


def is_first() -> bool:
    """Whether this process is the one that writes and prints: the only one, or the first that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_batch(samples: int, processes: int, accumulate: int) -> None:
    """Raise ValueError if so many processes cannot share a batch equally, or each its share in so many parts."""
    if samples % processes:
        raise ValueError(f"a batch of {samples} cannot be shared equally among {processes} processes")
    if samples // processes % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the {samples // processes} samples of a process")


def check_device(device: str) -> None:
    """Raise ValueError if there is no such device here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this torch finds no CUDA device")


def world(device: str) -> World:
    """Join the processes that torchrun started, if it did; otherwise one process is the world.

    They stay together until they end: a group that was left cannot be joined again for the next run, as the processes
    would find each other's old addresses.
    """
    distributed = "RANK" in os.environ
    if device == "cuda" and distributed:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if distributed and not dist.is_initialized():
        dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
        atexit.register(dist.destroy_process_group)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(
        rank, size, torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    )


def wrap(model: nn.Module, parallel: str, world: World) -> nn.Module:
    """A model that is trained by all processes together; a model of one process is left as it is.

    With "fsdp" every block (the children of `blocks`) is a unit of its own, gathered when it is needed. With "experts"
    every process has all but the experts of mixtures, of which each has a part.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "experts":
        divided = expert_parallel(model, dist.device_mesh.init_device_mesh(world.device.type, (world.size,)))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, divided)
        return DistributedDataParallel(model)
    # The loop does nothing to an output in place, and some layers' are views.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scale the gradients of all parameters so that their norm, over all processes, is at most `limit`."""
    moved = [p for p in model.parameters() if p.grad is not None]
    kinds = [[p for p in moved if isinstance(p, DTensor) == divided] for divided in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(whole).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, total)


def accumulating(model: nn.Module, more: bool) -> AbstractContextManager[object]:
    """Around a backward pass: whether more of them follow in this step, so that gradients need not be exchanged yet."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
