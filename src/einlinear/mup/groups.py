"""Structure-aware muP for whole models: parameter groups.

One learning rate, found at the width of a small dense base model, serves every width and every structure: a dense
matrix learns at base_in / in of it under Adam, and every factor of a structured matrix at that times its own
multiplier (Qiu et al., arXiv 2406.06248, section 3; Yang et al., arXiv 2203.03466). The numbers of a single structure
are in `structures/mup.py`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from einlinear.mup.kinds import as_matrix
from einlinear.mup.roles import Parameter, check_matches, parameters
from einlinear.nn.names import as_globs, as_rules
from einlinear.structures.scales import adam_multipliers, muon_multipliers, sgd_multipliers, spectral_std

ADAM = ("adam", "adamw", "nadam", "radam", "adamax", "lion")  # their update does not depend on the gradient's size
_FACTORS = {"adam": adam_multipliers, "sgd": sgd_multipliers, "muon": muon_multipliers}  # by rule
_ADAM_RMS = 0.2  # of an entry of Adam's updates, over the learning rate: arXiv 2502.16982, section 2.2

logger = logging.getLogger("einlinear")

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Base: TypeAlias = "nn.Module | Shapes | str | Path | None"


def base_shapes(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """The shapes that identify a base model, by name, to be saved as JSON: of every weight and every other parameter.

    Of a structured layer it is the shape [out_features, in_features] of its whole weight, also of each of its experts.
    Shapes are those of whole parameters, also of a model whose parameters are divided among processes.

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
    weight_decay: float | None = None,
    structure_aware: bool = True,
    lr_scale: Mapping[str, float] | None = None,
    roles: Mapping[str, str] | None = None,
    hidden: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with structure-aware learning rates, for any torch optimizer of the kind named.

    Args:
        model: the model to train; build the groups after wrapping it in FSDP2.
        lr: the learning rate of the dense base model.
        base: the model of base width, whose layers have the same names and may be dense (on the meta device it costs
            nothing); or its `base_shapes`, as a mapping or as the path of a JSON file. None says that this model has
            the base width itself.
        optimizer: "adamw" or another of `ADAM`, "sgd", or "muon": `einlinear.mup.Muon` for matrices and AdamW for the
            rest, at the same `lr`. Muon makes all singular values of an update one, and muP asks for a spectral
            norm of sqrt(fan_out / fan_in) of every matrix (Yang et al., arXiv 2310.17813, condition 1). So the
            multiplier of a matrix is the root of fan_out / fan_in over that in the base, and a structured one is seen
            as the batches of matrices its k factors are, each at 1 / k of theirs. In the base, updates have the
            root mean square of AdamW's (Liu et al., arXiv 2502.16982, section 2.2), hence the same `lr`.
        weight_decay: for matrices and embeddings, that is parameters of two or more dimensions, as in timm and in the
            paper; biases, norms, scales, class tokens and scalars get none. It is passed on as it is: AdamW decays a
            group by its own learning rate times this. None leaves it out of their groups, so that the optimizer's own
            applies, which is 0.01 for torch's AdamW.
        structure_aware: False gives every factor the multiplier of a dense layer, as a control.
        lr_scale: glob on qualified names -> a multiplier of one's own on top; the first that matches counts.
        roles: glob on qualified names -> "matrix" or "vector", to override what is known of a module, or taken by the
            kind of a parameter where nothing is known of it (see `einlinear.mup.kinds.by_kind`). An embedding
            that shares its weight with a head is a matrix, in whichever order the two are registered. That keeps steps
            from growing with the width. A model that multiplies its logits by base width / width can say
            ``roles={"*embed*": "vector"}``: then the embedding learns as one without a head.
        hidden: a glob, or several, on the matrices that Muon takes; its authors leave heads to AdamW. Default: all.

    Returns:
        Groups with "params", "param_names", "lr", "lr_mult" (lr over the argument lr) and, unless it is left to the
        optimizer, "weight_decay"; "by_kind" are the names of those whose role was taken by their kind, where there are
        any. Groups for Muon have "matrices" (the order of axes and shape that make matrices of a parameter) and "size"
        (what a unit spectral norm is multiplied with). Parameters of equal settings share a group.

    Raises:
        ValueError: an unknown optimizer, `hidden` for another one than Muon, a parameter that the base lacks, a glob
            that matches none, parameters that FSDP1 has flattened, or a parameter of unknown role: no layer of torch's,
            transformers' or this library's holds it, `roles` does not name it, and its shape in the base contradicts
            what its kind would be.

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
    found, shapes = resolved(model, base, roles)
    scales = as_rules(lr_scale, "lr_scale")
    check_matches(scales, found, "lr_scale")
    if hidden is not None and optimizer != "muon":
        raise ValueError(f"hidden says what Muon takes, but the optimizer is {optimizer!r}")
    hidden_globs = as_globs("*" if hidden is None else hidden, "hidden")
    if hidden is not None:
        check_matches(hidden_globs, [p for p in found if p.matrix], "hidden")
    _warn_of_tied(found, shapes)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in found:
        muon = optimizer == "muon" and p.matrix is not None and any(p.matches(glob) for glob in hidden_globs)
        rule = "muon" if muon else "sgd" if optimizer == "sgd" else "adam"
        multiplier = _multiplier(p, shapes, rule, structure_aware)
        multiplier *= next((scale for glob, scale in scales.items() if p.matches(glob)), 1.0)
        decay = weight_decay if p.matrix or p.decays else 0.0
        own: dict[str, Any] = (
            {"matrices": p.matrices, "size": _ADAM_RMS * math.sqrt(max(shapes[p.key]))} if muon else {}
        )
        group = groups.setdefault(
            # Muon takes equal shapes together, and no optimizer takes tensors and DTensors together
            (multiplier, decay, *own.values(), p.shape if muon else None, type(p.tensor)),
            {"params": [], "param_names": [], "lr": lr * multiplier, "lr_mult": multiplier, **own},
        )
        if decay is not None:
            group["weight_decay"] = decay
        group["params"].append(p.tensor)
        group["param_names"].append(p.name)
        if p.by_kind:
            group.setdefault("by_kind", []).append(p.name)
    return list(groups.values())


def _warn_of_tied(found: Sequence[Parameter], shapes: Shapes) -> None:
    """Say of heads tied to embeddings that they start too large for steps to be of one size at every width."""
    for p in found:
        whole = p.tied and type(p.tensor) is nn.Parameter and tuple(p.tensor.shape) == p.shape and not p.tensor.is_meta
        if not whole or p.matrix is None or shapes[p.key][1] == p.matrix.in_features:
            continue
        size = float(p.tensor.detach().float().square().mean().sqrt())
        std = spectral_std(p.matrix.in_features, p.matrix.out_features)
        if size > 2 * std:
            logger.warning(
                "%s is shared by an embedding and a head. Its entries have the size %.2g, where a head of %d inputs "
                "starts at %.2g: logits, and how much a step changes them, will grow with the width. el.init_ draws it "
                "as a head; or multiply the logits by base width / width, and pass roles={%r: 'vector'}",
                *(p.name, size, p.matrix.in_features, std, p.name),
            )


def _multiplier(p: Parameter, shapes: Shapes, rule: str, structure_aware: bool) -> float:
    """The learning rate of a parameter over that of the base model."""
    if not p.scalar and 0 in (*p.shape, *shapes[p.key]):  # DINOv3 has no register tokens by default
        return 1.0
    if p.matrix is None:
        growth = 1.0 if p.scalar else math.prod(p.shape) / math.prod(shapes[p.key])
        return growth if rule == "sgd" else 1.0
    fan_in, fan_out = p.matrix.in_features, p.matrix.out_features
    base_out, base_in = shapes[p.key]
    aspect = (fan_out / fan_in) / (base_out / base_in)
    width = {"adam": base_in / fan_in, "sgd": aspect, "muon": math.sqrt(aspect)}[rule]
    if p.matrix.structure is None or not structure_aware:
        return width
    return width * _FACTORS[rule](p.matrix.structure)[p.matrix.factor]


def _shapes(found: Sequence[Parameter]) -> dict[str, list[int]]:
    return {p.key: [p.matrix.out_features, p.matrix.in_features] if p.matrix else list(p.shape) for p in found}


def resolved(
    model: nn.Module, base: Base, roles: Mapping[str, str] | None
) -> tuple[list[Parameter], dict[str, Sequence[int]]]:
    """Every parameter with its role, and its shape in the base: that of the whole weight for a matrix."""
    found = parameters(model, roles)
    shapes = _base(base, found, roles)
    told: list[Parameter] = []
    unknown: list[Parameter] = []
    for p in found:
        in_base = shapes.get(p.key, p.shape)
        taken = p if p.known else p.taken_by_kind(None if base is None else in_base)
        if taken is None:
            unknown.append(p)
            continue
        if taken.by_kind and taken.matrix is not None:
            of_base = as_matrix(in_base, taken.matrix.stacked, p.transposed)
            shapes[p.key] = [of_base.out_features, of_base.in_features]
        told.append(taken)
    if unknown:
        raise ValueError(
            f"the role of these parameters is unknown: {listed(unknown)}. Say what they are with "
            "roles={glob: role}: 'vector' if their learning rate must not depend on the width, as for positions, norms "
            "and scales, or 'matrix' if they are of shape (out_features, in_features)"
        )
    for role, of_role in (
        ("vectors", [p for p in told if p.by_kind and p.matrix is None]),
        ("matrices", [p for p in told if p.by_kind and p.matrix is not None]),
        ("matrices, though embeddings are tied to them", [p for p in told if p.tied]),
    ):
        if of_role:
            logger.info("taken for %s: %s; roles={glob: role} says otherwise", role, listed(of_role))
    return told, shapes


def _base(base: Base, found: Sequence[Parameter], roles: Mapping[str, str] | None) -> dict[str, Sequence[int]]:
    """The base shape of every parameter, which must be there and of as many dimensions."""
    own = _shapes(found)
    shapes: dict[str, Sequence[int]]
    if base is None:
        return dict(own)
    if isinstance(base, nn.Module):
        shapes = {**base_shapes(base, roles)}
    elif isinstance(base, Mapping):
        shapes = dict(base)
    elif isinstance(base, str | Path):
        shapes = json.loads(Path(base).read_text(encoding="utf-8"))
    else:
        raise TypeError(f"base must be a model, a mapping of shapes, the path of a JSON file or None, not {base!r}")
    for p in found:
        if p.scalar:
            continue  # these, such as gammas, learn at the base rate whether the base has them or not
        if p.key not in shapes and p.beside in shapes:  # a router, and a base without experts
            shapes[p.key] = [own[p.key][0], shapes[p.beside][1]]
        if p.key not in shapes and (other := next((name for name in p.names if name in shapes), None)):
            shapes[p.key] = shapes[other]  # the same tensor, by another of its names
        if p.key not in shapes:
            raise ValueError(
                f"the base has no {p.key!r}: it must be the same model, at another width, with equal names"
            )
        if len(shapes[p.key]) != len(own[p.key]):
            raise ValueError(f"{p.key!r} has shape {own[p.key]}, but {list(shapes[p.key])} in the base")
    return shapes


def listed(parameters: Sequence[Parameter]) -> str:
    more = f" and {len(parameters) - 10} more" if len(parameters) > 10 else ""
    return ", ".join(f"{p.name} {p.shape}" for p in parameters[:10]) + more
