"""Structure-aware initialisation of whole models, by the numbers of `structures/mup.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from einlinear.mup.groups import Base, listed, logger, resolved
from einlinear.mup.roles import Parameter, check_matches
from einlinear.nn.factored import Factored
from einlinear.nn.names import as_globs
from einlinear.structures.scales import spectral_std


@torch.no_grad()
def init_(
    model: nn.Module,
    *,
    base: Base = None,
    zero: str | Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> nn.Module:
    """Structure-aware initialisation, in place.

    Every matrix is drawn with standard deviation sqrt(min(fan_in, fan_out)) / fan_in: structured layers as by
    `Linear.reset_parameters`, others, and every matrix of a stack of experts, as by that of a "dense" one. Biases of
    these layers and routers of mixtures are zero. Embeddings, norms and other vectors stay as they are, and so does
    what is taken for a matrix by its kind alone. An embedding that shares its weight with a head is drawn as the head.

    A layer that is zero stays zero, as a head or the last layer of a residual branch may have been made: the model has
    decided that. It is logged to the logger "einlinear" at level INFO.

    Args:
        model: any model `param_groups` takes, on the meta device or with values, as whole tensors or as DTensors.
        base: as for `param_groups`. Nothing that is drawn depends on it: it is only checked, so that a model that the
            learning rates cannot be carried over to is refused before it is trained.
        zero: a glob, or several, on qualified names of layers that start at zero, such as heads and the last layers of
            residual branches; of a structured layer only the last factor is set to zero. Then they are the only ones:
            with ``zero=()`` every layer is drawn. Default (None): those that are zero now. A layer is zero where every
            term of its structure has a factor of zeros; this factor stays zero, or the last if all are. If all matrices
            of a model are zero, nothing has been decided yet, as after `to_empty`, and all are drawn.
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
    found, _ = resolved(model, base, roles)
    _check_whole(found)
    matrices = [p for p in found if p.matrix]
    if zero is None:
        zeros = _zeros(matrices)
        if zeros:
            logger.info("init_ leaves at zero: %s; zero=() draws them", listed(zeros))
    else:
        globs = as_globs(zero, "zero")
        check_matches(globs, matrices, "zero")
        zeros = [p for p in matrices if p.is_last_factor and any(p.matches(glob) for glob in globs)]
    for module in model.modules():
        if isinstance(module, Factored):
            module.reset_parameters()
    drawn = [p for p in matrices if not p.by_kind or (p.matrix and p.matrix.stacked)]
    biases = {f"{name.removesuffix('weight')}bias" for p in drawn for name in p.names}
    for p in found:
        if p.matrix is None and p.name in biases:
            nn.init.zeros_(p.tensor)
    for p in drawn:
        if p.matrix is not None and p.matrix.structure is None:
            nn.init.normal_(p.tensor, std=spectral_std(p.matrix.in_features, p.matrix.out_features))
    for p in (*zeros, *(p for p in matrices if p.beside is not None)):
        nn.init.zeros_(p.tensor)
    return model


def _check_whole(found: Sequence[Parameter]) -> None:
    """Raise ValueError for parameters that are divided in such a way that only a part could be drawn."""
    divided = next((p for p in found if tuple(p.tensor.shape) != p.shape), None)
    if divided is None:
        return
    if hasattr(divided.tensor, "ds_shape"):
        by = "DeepSpeed's ZeRO-3"
        gather = "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
        first = "deepspeed.initialize, on a model that was made outside of deepspeed.zero.Init"
    else:
        by, gather = "FSDP1", "FullyShardedDataParallel.summon_full_params(model)"
        first = "FullyShardedDataParallel"
    raise ValueError(
        f"{divided.name} of shape {divided.shape} is divided among processes by {by}, so this one cannot draw it. Call "
        f"init_ within `with {gather}:`, or before {first}"
    )


def _zeros(matrices: Sequence[Parameter]) -> list[Parameter]:
    """What is zero now and is to stay so: parameters of layers whose whole matrix is zero."""
    layers: dict[tuple[str, Any], list[Parameter]] = {}
    for p in matrices:
        if p.beside is None:
            layers.setdefault((p.key, p.matrix and p.matrix.structure), []).append(p)
    zeros = [found for layer in layers.values() if (found := _zeros_of(layer))]
    drawn_all = len(layers) > 1 and len(zeros) == len(layers)
    return [] if drawn_all else [p for found in zeros for p in found]


def _zeros_of(layer: Sequence[Parameter]) -> list[Parameter]:
    """Of the factors of one layer, or its only weight: those that stay zero, one of every term; none if it is not."""
    kept: list[Parameter] = []
    term: list[Parameter] = []
    for p in layer:
        if not p.tensor.is_meta and not p.tensor.any():
            term.append(p)
        if p.is_last_factor:
            if not term:
                return []
            kept.append(term[-1])
            term = []
    return kept
