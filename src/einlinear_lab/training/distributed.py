"""Distributed training under torchrun: the processes, how they share a batch and a model, and the state of a run."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from einlinear.nn.moe.parallel import expert_parallel

# Of the state of a run. Parameter groups are not saved, as they follow from its config.
_UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MODEL, _OPTIMIZER, _SCALER, _RANDOM = "model.", "optimizer.", "scaler.", "random"


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.size > 1 else None

    def share(self, x: Tensor) -> Tensor:
        return x.tensor_split(self.size)[self.rank]

    def check_equal(self, value: int, noun: str) -> None:
        if self.size > 1:
            values: list[int] = [0] * self.size
            dist.all_gather_object(values, value)
            if len(set(values)) > 1:
                raise ValueError(f"the processes found different {noun}: {', '.join(map(str, values))}")

    def mean(self, value: Tensor) -> float:
        value = value.detach().double()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size


def is_first() -> bool:
    """Return whether this process writes and prints: it is the only one, or has rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_batch(samples: int, processes: int, accumulate: int) -> None:
    if samples % processes:
        raise ValueError(f"a batch of {samples} cannot be shared equally among {processes} processes")
    if samples // processes % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the {samples // processes} samples of a process")


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this torch finds no CUDA device")


def world(device: str) -> World:
    """Join the processes that torchrun started, or return a world of one process."""
    is_distributed = "RANK" in os.environ
    if device == "cuda" and is_distributed:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if is_distributed and not dist.is_initialized():
        # gloo for tensors on the CPU, NCCL for GPUs. Processes could not join another group for the next run.
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, torch.device(f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device))


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


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Return the state of model and optimizer (on rank 0), scaler and torch's generator, by unwrapped names."""
    parameters: dict[str, Any] = get_model_state_dict(model, options=_UNSHARDED)
    optimised: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_UNSHARDED)
    tensors = {f"{_MODEL}{name}": value for name, value in parameters.items()}
    for name, values in optimised.get("state", {}).items():
        tensors |= {f"{_OPTIMIZER}{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    tensors |= {f"{_SCALER}{name}": torch.as_tensor(value) for name, value in scaler.state_dict().items()}
    return tensors | {_RANDOM: torch.get_rng_state()}


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]
) -> None:
    """Load the tensors of `gather`, on every process. Raises RuntimeError for those of another model."""

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    set_model_state_dict(model, part(_MODEL), options=_UNSHARDED)
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    state: dict[str, Any] = {}
    for name, value in part(_OPTIMIZER).items():
        parameter, key = name.rsplit(".", 1)
        state.setdefault(parameter, {})[key] = value
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=_UNSHARDED)
    scaler.load_state_dict({name: value.item() for name, value in part(_SCALER).items()})
    torch.set_rng_state(tensors[_RANDOM])
