"""Checkpoint state of a run as unsharded tensors by name, however processes share the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

Optimizers: TypeAlias = list[torch.optim.Optimizer]

_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
_MODEL, _OPTIMIZER, _SCALER, _RANDOM = "model.", "optimizer.", "scaler.", "random"


def gather(model: nn.Module, optimizers: Optimizers, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Return parameters, buffers, and the states of optimizers, scaler and torch's generator.

    All processes have to call it; rank 0 gets the tensors of model and optimizers, by the names of the unwrapped model.
    Parameter groups are not saved, as they follow from the config of the run.
    """
    parameters: dict[str, Any] = get_model_state_dict(model, options=_OPTIONS)
    optimised: dict[str, Any] = get_optimizer_state_dict(model, optimizers, options=_OPTIONS)
    tensors = {f"{_MODEL}{name}": value for name, value in parameters.items()}
    for name, values in optimised.get("state", {}).items():
        tensors |= {f"{_OPTIMIZER}{name}.{key}": torch.as_tensor(value) for key, value in values.items()}
    tensors |= {f"{_SCALER}{name}": torch.as_tensor(value) for name, value in scaler.state_dict().items()}
    return tensors | {_RANDOM: torch.get_rng_state()}


def restore(
    model: nn.Module, optimizers: Optimizers, scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]
) -> None:
    """Load the tensors of `gather`, on every process. Raises RuntimeError for those of another model."""

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    set_model_state_dict(model, part(_MODEL), options=_OPTIONS)
    groups = get_optimizer_state_dict(model, optimizers)["param_groups"]
    state: dict[str, Any] = {}
    for name, value in part(_OPTIMIZER).items():
        parameter, key = name.rsplit(".", 1)
        state.setdefault(parameter, {})[key] = value
    set_optimizer_state_dict(model, optimizers, {"state": state, "param_groups": groups}, options=_OPTIONS)
    scaler.load_state_dict({name: value.item() for name, value in part(_SCALER).items()})
    torch.set_rng_state(tensors[_RANDOM])
