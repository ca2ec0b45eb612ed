"""Distributed training under torchrun: the processes, and how they share a batch and a model."""

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
    """Rank of this process, number of processes, and the device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Process group of all processes; None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    def share(self, x: Tensor) -> Tensor:
        """Return this process's rows of a batch."""
        return x.tensor_split(self.size)[self.rank]

    def check_equal(self, value: int, noun: str) -> None:
        """Raise ValueError on every process if the processes have different values."""
        if self.size > 1:
            values: list[int] = [0] * self.size
            dist.all_gather_object(values, value)
            if len(set(values)) > 1:
                raise ValueError(f"the processes found different {noun}: {', '.join(map(str, values))}")

    def mean(self, value: Tensor) -> float:
        """Return the mean of a number over all processes."""
        value = value.detach().double()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size


def is_first() -> bool:
    """Return whether this process writes and prints: it is the only one, or has rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_batch(samples: int, processes: int, accumulate: int) -> None:
    """Raise ValueError if the batch does not divide into equal micro-batches of all processes."""
    if samples % processes:
        raise ValueError(f"a batch of {samples} cannot be shared equally among {processes} processes")
    if samples // processes % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the {samples // processes} samples of a process")


def check_device(device: str) -> None:
    """Raise ValueError if the device is "cuda" and torch finds no CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this torch finds no CUDA device")


def world(device: str) -> World:
    """Join the processes that torchrun started, or return a world of one process.

    The process group lives until the process exits: a new group for the next run could not be joined, as the processes
    would read the addresses of the old one.
    """
    distributed = "RANK" in os.environ
    if device == "cuda" and distributed:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if distributed and not dist.is_initialized():
        # gloo for tensors on the CPU, NCCL for tensors on GPUs.
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    index = torch.cuda.current_device() if device == "cuda" else None
    return World(rank, size, torch.device(device, index) if index is not None else torch.device(device))


def wrap(model: nn.Module, parallel: str, world: World) -> nn.Module:
    """Wrap a model for training by all processes; return the model itself for a single process.

    "fsdp" shards every block (the children of `blocks`) as a unit of its own. "experts" replicates the model except
    the experts of mixtures, which it shards.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    if parallel == "experts":
        sharded = expert_parallel(model, mesh)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
        return DistributedDataParallel(model)
    # Some layers return views. The loop changes no output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scale the gradients of all parameters so that their norm over all processes is at most `limit`."""
    trained = [p for p in model.parameters() if p.grad is not None]
    # torch cannot take the norm of sharded and unsharded gradients together.
    groups = [[p for p in trained if isinstance(p, DTensor) == is_sharded] for is_sharded in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups if group]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, total)


def accumulating(model: nn.Module, more: bool) -> AbstractContextManager[object]:
    """Context of a backward pass; gradients are not synchronised if more micro-batches of the step follow."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
