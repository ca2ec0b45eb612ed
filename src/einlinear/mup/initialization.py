"""Structure-aware initialisation of whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from einlinear.mup.groups import Base, listed, logger, resolve
from einlinear.mup.parameter_roles import Parameter, check_matches
from einlinear.nn.factored import Factored
from einlinear.nn.names import as_globs


@torch.no_grad()
def init_(
    model: nn.Module,
    *,
    base: Base = None,
    zero: str | Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> nn.Module:
    """Initialise a model in place, with the structure-aware standard deviations of muP.

    Every matrix is drawn with standard deviation sqrt(min(fan_in, fan_out)) / fan_in, structured layers as by
    `Linear.reset_parameters`. Biases of these layers and routers of mixtures are zero. Embeddings, norms and other
    vectors stay as they are, and so do matrices whose role was only inferred, except stacks of experts. An embedding
    that shares its weight with a head is drawn as the head.

    Args:
        model: any model `param_groups` takes, on the meta device or with values, as whole tensors or as DTensors.
        base: as for `param_groups`, and only checked: a model without matching learning rates is refused before it is
            trained.
        zero: a glob, or several, on qualified names of the layers that start at zero, all others are drawn; of a
            structured layer only the last factor is set to zero. Default (None): layers that are zero now, such as
            heads, stay zero and are logged at level INFO. If all matrices of a model are zero, as after `to_empty`,
            all are drawn.
        roles: as for `param_groups`.

    Returns:
        The model.

    Raises:
        ValueError: as `param_groups`, and parameters that DeepSpeed's ZeRO-3 or FSDP1 has divided among processes.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> model = el.init_(model, zero="2")
        >>> bool(model[2].weight.any())
        False
        >>> bool(el.init_(model)[2].weight.any()), bool(el.init_(model, zero=())[2].weight.any())
        (False, True)
    """
    params, _ = resolve(model, base, roles)
    _check_undivided(params)
    matrices = [p for p in params if p.role.is_matrix]
    routers = [p for p in matrices if p.role.shares_input_with]
    if zero is None:
        zeros = _zero_parameters([p for p in matrices if not p.role.shares_input_with])
        if zeros:
            logger.info("init_ leaves at zero: %s; zero=() draws them", listed(zeros))
    else:
        globs = as_globs(zero, "zero")
        check_matches(globs, matrices, "zero")
        zeros = [p for p in matrices if p.is_last_factor and any(p.matches(glob) for glob in globs)]
    for module in model.modules():
        if isinstance(module, Factored):
            module.reset_parameters()
    drawn = [p for p in matrices if not p.is_inferred or p.role.stacked]
    biases = {f"{name.removesuffix('weight')}bias" for p in drawn for name in p.names}
    for p in params:
        if not p.role.is_matrix and p.name in biases:
            nn.init.zeros_(p.tensor)
    for p in drawn:
        if p.role.structure is None:
            nn.init.normal_(p.tensor, std=p.init_std)
    for p in (*zeros, *routers):
        nn.init.zeros_(p.tensor)
    return model


def _check_undivided(params: Sequence[Parameter]) -> None:
    """Raise ValueError for parameters of which this process could draw only a part."""
    divided = next((p for p in params if tuple(p.tensor.shape) != p.shape), None)
    if divided is None:
        return
    if hasattr(divided.tensor, "ds_shape"):
        by, first = "DeepSpeed's ZeRO-3", "deepspeed.initialize, on a model made outside of deepspeed.zero.Init"
        gather = "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
    else:
        by, first = "FSDP1", "FullyShardedDataParallel"
        gather = "FullyShardedDataParallel.summon_full_params(model)"
    raise ValueError(
        f"{divided.name} of shape {divided.shape} is divided among processes by {by}. Call init_ within "
        f"`with {gather}:`, or before {first}"
    )


def _zero_parameters(matrices: Sequence[Parameter]) -> list[Parameter]:
    """Return the parameters that make the full matrix of their layer zero; none if all layers are zero."""
    layers: dict[tuple[str, Any], list[Parameter]] = {}
    for p in matrices:
        layers.setdefault((p.key, p.role.structure), []).append(p)
    zero_layers = [zeros for layer in layers.values() if (zeros := _zeros_of_terms(layer))]
    none_decided = len(layers) > 1 and len(zero_layers) == len(layers)
    return [] if none_decided else [p for zeros in zero_layers for p in zeros]


def _zeros_of_terms(factors: Sequence[Parameter]) -> list[Parameter]:
    """Return the last zero factor of every term of a layer, or nothing if a term has none: the layer is not zero."""
    zeros: list[Parameter] = []
    term: list[Parameter] = []
    for p in factors:
        term.append(p)
        if p.is_last_factor:
            zero = next((p for p in reversed(term) if not p.tensor.is_meta and not p.tensor.any()), None)
            if zero is None:
                return []
            zeros.append(zero)
            term = []
    return zeros
