"""Structure-aware muP for whole models: initialisation and parameter groups.

One learning rate, found at the width of a small dense base model, serves every width and every structure: a dense
matrix learns at base_in / in of it under Adam, and every factor of a structured matrix at that times its own
multiplier (`structures/scaling.py`; Qiu et al., arXiv 2406.06248, section 3; Yang et al., arXiv 2203.03466).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from einlinear.nn import Linear
from einlinear.parametrize.roles import Parameter, parameters
from einlinear.structures.scaling import adam_multipliers, sgd_multipliers

ADAM = ("adam", "adamw", "nadam", "radam", "adamax", "lion")  # their update does not depend on the gradient's size

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Base: TypeAlias = "nn.Module | Shapes | str | Path | None"


def base_shapes(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """What a model tells as a base, to be saved as JSON: the shape of every weight and every other parameter, by name.

    A structured layer tells the shape [out_features, in_features] of its whole weight.

    >>> import einlinear as el
    >>> el.base_shapes(el.Linear(64, 256, "btt"))
    {'weight': [256, 64], 'bias': [256]}
    """
    return _shapes(parameters(model, roles))


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    base: Base,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    structure_aware: bool = True,
    lr_scale: Mapping[str, float] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with structure-aware learning rates, for any torch optimizer of the kind named.

    Args:
        model: the model to train; build the groups after wrapping it in FSDP2.
        lr: the learning rate of the dense base model.
        base: the model of base width, whose layers have the same names and may be dense (on the meta device it costs
            nothing); or its `base_shapes`, as a mapping or as the path of a JSON file. None says that this model has
            the base width itself.
        optimizer: "adamw" or another of `ADAM`, or "sgd".
        weight_decay: for matrices and embeddings; biases, norms and scalars get none. It is passed on as it is: AdamW
            decays a group by its own learning rate times this.
        structure_aware: False gives every factor the multiplier of a dense layer, as a control.
        lr_scale: glob on qualified names -> a multiplier of one's own on top; the first that matches counts.
        roles: see `parametrize.roles.parameters`.

    Returns:
        Groups with "params", "param_names", "lr", "lr_mult" (lr over the argument lr) and "weight_decay". Parameters of
        equal settings share a group.

    Raises:
        ValueError: unknown optimizer, a parameter of unknown role, one that the base lacks, a glob that matches none.

    Example:
        >>> import torch, einlinear as el
        >>> layer, base = el.Linear(256, 256, "btt"), torch.nn.Linear(64, 64)
        >>> groups = el.param_groups(layer, lr=1e-3, base=base, weight_decay=0.1)
        >>> [(g["param_names"], g["lr_mult"], g["weight_decay"]) for g in groups]
        [(['A', 'B'], 2.0, 0.1), (['bias'], 1.0, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if optimizer not in (*ADAM, "sgd"):
        raise ValueError(f"optimizer must be 'sgd' or one of {', '.join(ADAM)}, not {optimizer!r}")
    found = parameters(model, roles)
    shapes = _base(base, found, roles)
    scales = dict(lr_scale or {})
    _check_globs(scales, found, "lr_scale")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for p in found:
        multiplier = _multiplier(p, shapes, "sgd" if optimizer == "sgd" else "adam", structure_aware)
        multiplier *= next((scale for glob, scale in scales.items() if p.matches(glob)), 1.0)
        decay = weight_decay if p.matrix or p.tensor.dim() >= 2 else 0.0
        group = groups.setdefault(
            (multiplier, decay),
            {"params": [], "param_names": [], "lr": lr * multiplier, "lr_mult": multiplier, "weight_decay": decay},
        )
        group["params"].append(p.tensor)
        group["param_names"].append(p.name)
    return list(groups.values())


@torch.no_grad()
def init_(
    model: nn.Module, *, base: Base, zero: Sequence[str] = (), roles: Mapping[str, str] | None = None
) -> nn.Module:
    """Structure-aware initialisation, in place.

    Factors are drawn as `Linear.reset_parameters` draws them, dense matrices with standard deviation
    sqrt(min(in, out)) / in, or 1 / sqrt(in) where in is not a width (it is the same in the base, as in an input layer);
    biases of these layers are zero. Embeddings, norms and other vectors stay as they are.

    Args:
        model: any model `param_groups` takes.
        base: as for `param_groups`.
        zero: globs on qualified names of layers that start at zero, such as heads and the last layers of residual
            branches; of a structured layer only the last factor is set to zero.
        roles: see `parametrize.roles.parameters`.

    Returns:
        The model.

    Raises:
        ValueError: as `param_groups`.
    """
    found = parameters(model, roles)
    shapes = _base(base, found, roles)
    matrices = [p for p in found if p.matrix]
    _check_globs({glob: 0.0 for glob in zero}, matrices, "zero")
    for module in model.modules():
        if isinstance(module, Linear):
            module.reset_parameters()
    biases = {f"{p.name.removesuffix('weight')}bias" for p in matrices}
    for p in found:
        if p.matrix is None and p.name in biases:
            nn.init.zeros_(p.tensor)
    for p in matrices:
        assert p.matrix is not None
        if p.structure is None:
            fan_in, fan_out = p.matrix
            is_width = base is None or shapes[p.key][1] != fan_in
            nn.init.normal_(p.tensor, std=math.sqrt(min(fan_in, fan_out) if is_width else fan_in) / fan_in)
        if p.is_last_factor and any(p.matches(glob) for glob in zero):
            nn.init.zeros_(p.tensor)
    return model


def _multiplier(p: Parameter, shapes: Shapes, rule: str, structure_aware: bool) -> float:
    """The learning rate of a parameter over that of the base model."""
    if p.matrix is None:
        growth = math.prod(p.tensor.shape) / math.prod(shapes[p.key]) if p.tensor.numel() > 1 else 1.0
        return growth if rule == "sgd" else 1.0
    fan_in, fan_out = p.matrix
    base_out, base_in = shapes[p.key]
    width = base_in / fan_in if rule == "adam" else (fan_out / fan_in) / (base_out / base_in)
    if p.structure is None or not structure_aware:
        return width
    return width * (adam_multipliers if rule == "adam" else sgd_multipliers)(p.structure)[p.factor]


def _shapes(found: Sequence[Parameter]) -> dict[str, list[int]]:
    return {p.key: [p.matrix[1], p.matrix[0]] if p.matrix else list(p.tensor.shape) for p in found}


def _base(base: Base, found: Sequence[Parameter], roles: Mapping[str, str] | None) -> Shapes:
    """The base shape of every parameter, checked to be there and of as many dimensions."""
    own = _shapes(found)
    if base is None:
        return own
    if isinstance(base, nn.Module):
        shapes: Shapes = base_shapes(base, roles)
    elif isinstance(base, Mapping):
        shapes = base
    elif isinstance(base, str | Path):
        shapes = json.loads(Path(base).read_text(encoding="utf-8"))
    else:
        raise TypeError(f"base must be a model, a mapping of shapes, the path of a JSON file or None, not {base!r}")
    for p in found:
        if p.tensor.numel() == 1 and p.matrix is None:
            continue  # scalars, such as gammas, learn at the base rate whether the base has them or not
        if p.key not in shapes:
            raise ValueError(
                f"the base has no {p.key!r}: it must be the same model, at another width, with equal names"
            )
        if len(shapes[p.key]) != len(own[p.key]):
            raise ValueError(f"{p.key!r} has shape {own[p.key]}, but {list(shapes[p.key])} in the base")
    return shapes


def _check_globs(globs: Mapping[str, float], found: Sequence[Parameter], argument: str) -> None:
    for glob in globs:
        if not any(p.matches(glob) for p in found):
            names = ", ".join(dict.fromkeys(p.name for p in found[:10]))
            raise ValueError(f"{argument}: {glob!r} matches nothing; the names are {names}, ...")
