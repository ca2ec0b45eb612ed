"""What a run has to remember, as plain tensors by name, whole on every process, however they share the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
_MODEL, _OPTIMIZER, _SCALER, _RANDOM = "model.", "optimizer.", "scaler.", "random"


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The parameters and buffers, the optimizer's state of each, the scaler's, and that of torch's generator.

    Names are those of the plain model. Settings of parameter groups are left out: they follow from the run's own.
    """
    tensors = {f"{_MODEL}{name}": value for name, value in get_model_state_dict(model, options=_OPTIONS).items()}
    state = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    tensors |= {
        f"{_OPTIMIZER}{name}": torch.as_tensor(value) for name, value in state.items() if name.startswith("state.")
    }
    tensors |= {f"{_SCALER}{name}": torch.as_tensor(value) for name, value in scaler.state_dict().items()}
    return tensors | {_RANDOM: torch.get_rng_state()}


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `gather` found.

    Raises:
        RuntimeError: they are those of another model.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    set_model_state_dict(model, part(_MODEL), options=_OPTIONS)
    now = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)  # for the settings of the groups
    settings = {name: value for name, value in now.items() if not name.startswith("state.")}
    set_optimizer_state_dict(model, optimizer, settings | part(_OPTIMIZER), options=_OPTIONS)
    scaler.load_state_dict({name: value.item() for name, value in part(_SCALER).items()})
    torch.set_rng_state(tensors[_RANDOM])
