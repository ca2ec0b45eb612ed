"""Parameter groups whose learning rates carry over from a narrow dense model to any width and structure.

Yang et al., arXiv 2203.03466; Qiu et al., arXiv 2406.06248, section 3.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from einlinear.mup.parameter_roles import Parameter, check_matches, matrix_role, parameters
from einlinear.nn.layer_info import UNKNOWN, Role
from einlinear.nn.names import as_globs, as_rules
from einlinear.structures.scales import adam_multipliers, muon_multipliers, sgd_multipliers

# their update does not depend on the size of the gradient
ADAM = ("adam", "adamw", "nadam", "radam", "adamax", "lion")
# root mean square of the entries of Adam's updates over the learning rate: arXiv 2502.16982, section 2.2
_ADAM_RMS = 0.2
_FACTOR_MULTIPLIERS = {"adam": adam_multipliers, "sgd": sgd_multipliers, "muon": muon_multipliers}

logger = logging.getLogger("einlinear")

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Base: TypeAlias = "nn.Module | Shapes | str | Path | None"


def base_shapes(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """Return the shapes of a base model by name, to be saved as JSON: of weights and all other parameters.

    The shape of a structured layer is [out_features, in_features], of its full weight or of each of its experts.

    >>> import einlinear as el
    >>> el.base_shapes(el.Linear(64, 256, "btt"))
    {'weight': [256, 64], 'bias': [256]}
    """
    return {p.key: p.base_shape for p in parameters(model, roles)}


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    base: Base,
    optimizer: str = "adamw",
    weight_decay: float | None = None,
    eps: float | None = None,
    structure_aware: bool = True,
    lr_scale: Mapping[str, float] | None = None,
    roles: Mapping[str, str] | None = None,
    hidden: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with structure-aware learning rates, for any torch optimizer of the kind named.

    Args:
        model: the model to train; build the groups after wrapping it in FSDP2.
        lr: the learning rate of the dense base model.
        base: the model of base width, whose layers have the same names and may be dense (on the meta device it costs
            nothing); or its `base_shapes`, as a mapping or as the path of a JSON file. None if this model itself has
            the base width.
        optimizer: "adamw" or another of `ADAM`, "sgd", or "muon": `einlinear.mup.Muon` for matrices and AdamW for the
            rest, at the same `lr`, since updates in the base have the root mean square of AdamW's (arXiv 2502.16982,
            section 2.2). Matrices under Muon follow the spectral condition (arXiv 2310.17813, condition 1).
        weight_decay: of parameters with two or more dimensions, passed on as it is; biases, norms, scales, class tokens
            and scalars get none. None leaves it to the optimizer, which is 0.01 for torch's AdamW.
        eps: of Adam, for every group that Muon and SGD do not take. None leaves it to the optimizer.
        structure_aware: False gives every factor the multiplier of a dense layer, as a control.
        lr_scale: glob on qualified names -> an additional multiplier; the first that matches counts.
        roles: glob on qualified names -> a role of muP: "input" (tables such as embeddings and positions), "hidden" or
            "output" (matrices) or "vector" (biases, norms and scales, without decay). The first match counts, before
            the description of a layer and before inference from name and shape. An embedding that shares its weight
            with a head is a hidden matrix, unless ``roles={"*embed*": "input"}``, for logits times base width / width.
        hidden: a glob, or several, on the matrices that Muon takes; its authors leave heads to AdamW. Default: all.

    Returns:
        Groups with "params", "param_names", "lr", "lr_mult" (lr over the argument lr) and, unless they are left to the
        optimizer, "weight_decay" and "eps"; "inferred" has the names of parameters whose role was inferred, if any.
        Groups for Muon have "matrix_view" (the order of axes and the shape that make matrices of a parameter) and
        "update_scale" (the factor of a unit spectral norm).

    Raises:
        ValueError: an unknown optimizer, `hidden` without Muon, a parameter that the base lacks, a glob that matches
            none, parameters that FSDP1 has flattened, or a parameter whose role is unknown.

    Example:
        >>> import torch, einlinear as el
        >>> layer, base = el.Linear(256, 256, "btt"), torch.nn.Linear(64, 64)
        >>> groups = el.param_groups(layer, lr=1e-3, base=base, weight_decay=0.1)
        >>> [(g["param_names"], g["lr_mult"], g["weight_decay"]) for g in groups]
        [(['A', 'B'], 2.0, 0.1), (['bias'], 1.0, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if optimizer not in (*ADAM, "sgd", "muon"):
        raise ValueError(f"optimizer must be 'sgd', 'muon' or one of {', '.join(ADAM)}, not {optimizer!r}")
    params, shapes = resolve(model, base, roles)
    scales = as_rules(lr_scale, "lr_scale")
    check_matches(scales, params, "lr_scale")
    if hidden is not None and optimizer != "muon":
        raise ValueError(f"hidden names the matrices for Muon, but the optimizer is {optimizer!r}")
    hidden_globs = as_globs("*" if hidden is None else hidden, "hidden")
    if hidden is not None:
        check_matches(hidden_globs, [p for p in params if p.role.is_matrix], "hidden")
    _warn_of_tied(params, shapes)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in params:
        muon = optimizer == "muon" and p.role.is_matrix and any(p.matches(glob) for glob in hidden_globs)
        rule = "muon" if muon else "sgd" if optimizer == "sgd" else "adam"
        base_shape = shapes.get(p.key, p.base_shape)
        multiplier = _lr_multiplier(p.role, rule, p.base_shape, base_shape, structure_aware)
        multiplier *= next((scale for glob, scale in scales.items() if p.matches(glob)), 1.0)
        config: dict[str, Any] = {"lr": lr * multiplier, "lr_mult": multiplier}
        decay = 0.0 if p.role.kind == "vector" else weight_decay
        optional = {"weight_decay": decay, "eps": eps if rule == "adam" else None}
        config |= {key: value for key, value in optional.items() if value is not None}
        if muon:
            config |= {"matrix_view": p.matrix_view, "update_scale": _ADAM_RMS * math.sqrt(max(base_shape))}
        # Muon takes equal shapes together, and no optimizer takes tensors and DTensors together
        key = (*config.items(), p.shape if muon else None, type(p.tensor))
        group = groups.setdefault(key, {"params": [], "param_names": [], **config})
        group["params"].append(p.tensor)
        group["param_names"].append(p.name)
        if p.is_inferred:
            group.setdefault("inferred", []).append(p.name)
    return list(groups.values())


def _lr_multiplier(role: Role, rule: str, shape: Sequence[int], base: Sequence[int], structure_aware: bool) -> float:
    """Return the learning rate of a parameter over that of the base model."""
    # parameters without entries exist: DINOv3 has no register tokens by default
    if role.is_scalar or 0 in (*shape, *base):
        return 1.0
    if not role.is_matrix:
        return math.prod(shape) / math.prod(base) if rule == "sgd" else 1.0
    (fan_out, fan_in), (base_out, base_in) = shape, base
    aspect = (fan_out / fan_in) / (base_out / base_in)
    width = {"adam": base_in / fan_in, "sgd": aspect, "muon": math.sqrt(aspect)}[rule]
    if role.structure is None or not structure_aware:
        return width
    return width * _FACTOR_MULTIPLIERS[rule](role.structure)[role.factor]


def _warn_of_tied(params: Sequence[Parameter], shapes: Shapes) -> None:
    """Warn of heads tied to embeddings that start so large that steps grow with the width."""
    for p in params:
        is_full = type(p.tensor) is nn.Parameter and tuple(p.tensor.shape) == p.shape and not p.tensor.is_meta
        if not (p.is_tied and is_full and p.role.is_matrix) or shapes[p.key][1] == p.role.in_features:
            continue
        size = float(p.tensor.detach().float().square().mean().sqrt())
        if size > 2 * p.init_std:
            logger.warning(
                "%s is shared by an embedding and a head. Its entries have the size %.2g, where a head of %d inputs "
                "starts at %.2g: logits, and how much a step changes them, will grow with the width. el.init_ draws it "
                "as a head; or multiply the logits by base width / width, and pass roles={%r: 'input'}",
                *(p.name, size, p.role.in_features, p.init_std, p.name),
            )


def resolve(
    model: nn.Module, base: Base, roles: Mapping[str, str] | None
) -> tuple[list[Parameter], dict[str, Sequence[int]]]:
    """Return every parameter with its role, described or inferred, and the shapes of the base model by key."""
    declared = parameters(model, roles)
    shapes = _base_shapes_of(base, declared, roles)
    params: list[Parameter] = []
    for p in declared:
        if p.role == UNKNOWN:
            in_base = shapes.get(p.key, p.shape)
            p = p.inferred(None if base is None else in_base)
            if p.role.is_matrix:
                of_base = matrix_role(in_base, p.role.stacked, p.transposed)
                shapes[p.key] = [of_base.out_features, of_base.in_features]
        params.append(p)
    if unknown := [p for p in params if p.role == UNKNOWN]:
        raise ValueError(
            f"the role of these parameters is unknown: {listed(unknown)}. Give it with roles={{glob: role}}: 'input' "
            "for tables such as positions, 'vector' for norms and scales, 'hidden' for matrices of shape (out, in)"
        )
    inferred = [p for p in params if p.is_inferred]
    for role, of_role in (
        ("vectors or tables", [p for p in inferred if not p.role.is_matrix]),
        ("matrices", [p for p in inferred if p.role.is_matrix]),
        ("matrices, though embeddings are tied to them", [p for p in params if p.is_tied]),
    ):
        if of_role:
            logger.info("taken for %s: %s; override with roles={glob: role}", role, listed(of_role))
    return params, shapes


def _base_shapes_of(
    base: Base, params: Sequence[Parameter], roles: Mapping[str, str] | None
) -> dict[str, Sequence[int]]:
    """Return the base shape of every parameter, by key."""
    current: dict[str, Sequence[int]] = {p.key: p.base_shape for p in params}
    shapes: dict[str, Sequence[int]]
    if base is None:
        return current
    if isinstance(base, nn.Module):
        shapes = {**base_shapes(base, roles)}
    elif isinstance(base, Mapping):
        shapes = dict(base)
    elif isinstance(base, str | Path):
        shapes = json.loads(Path(base).read_text(encoding="utf-8"))
    else:
        raise TypeError(f"base must be a model, a mapping of shapes, the path of a JSON file or None, not {base!r}")
    for p in params:
        # gammas and the like learn at the base rate whether the base has them or not
        if p.role.is_scalar:
            continue
        if p.key not in shapes and p.role.shares_input_with in shapes:
            # a router, and a base without experts
            shapes[p.key] = [current[p.key][0], shapes[p.role.shares_input_with][1]]
        if p.key not in shapes and (name := next((name for name in p.names if name in shapes), None)):
            # the same tensor, by another of its names
            shapes[p.key] = shapes[name]
        if p.key not in shapes:
            raise ValueError(f"the base has no {p.key!r}: it must be the same model at another width, with equal names")
        if len(shapes[p.key]) != len(current[p.key]):
            raise ValueError(f"{p.key!r} has shape {current[p.key]}, but {list(shapes[p.key])} in the base")
    return shapes


def listed(params: Sequence[Parameter]) -> str:
    more = f" and {len(params) - 10} more" if len(params) > 10 else ""
    return ", ".join(f"{p.name} {p.shape}" for p in params[:10]) + more
