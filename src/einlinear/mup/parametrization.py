"""Structure-aware muP of whole models: parameter groups and initialisation."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from einlinear.mup.base_model import Base, Shapes, depth_ratios, find_shapes, load_shapes
from einlinear.mup.parameter_roles import Parameter, RoleGlobs, check_matches, matrix_role, parameters
from einlinear.mup.products import check_pairs, product_of, product_shapes
from einlinear.mup.scaling_rules import DECAYS, Growth, Rule, decay_multiplier, eps_multiplier, lr_multiplier
from einlinear.nn.layer_descriptions import UNKNOWN
from einlinear.nn.linear import Factored
from einlinear.nn.moe import Mixture
from einlinear.nn.names import as_globs, as_rules

# their update does not depend on the size of the gradient
ADAM = ("adam", "adamw", "nadam", "radam", "adamax", "lion")

logger = logging.getLogger("einlinear")

Globs: TypeAlias = "str | Sequence[str] | None"


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    base: Base,
    optimizer: str = "adamw",
    weight_decay: float | None = None,
    decay: str = "independent",
    eps: float | None = None,
    alpha: float = 1.0,
    structure_aware: bool = True,
    lr_scale: Mapping[str, float] | None = None,
    roles: RoleGlobs = None,
    hidden: Globs = None,
    product: bool = False,
) -> list[dict[str, Any]]:
    """Return parameter groups with structure-aware learning rates, for any torch optimizer of the kind named.

    One learning rate serves every width and structure (arXiv 2203.03466; arXiv 2406.06248, section 3).

    Args:
        model: the model to train; build the groups after wrapping it in FSDP2.
        lr: the learning rate of the dense base model.
        base: the model of base width, whose layers have the same names and may be dense or on the meta device; or its
            `base_shapes`, as a mapping or as the path of a JSON file. None if this model has the base width. Of layers
            that are numbered, such as blocks.0 to blocks.11, the base may have fewer: see `alpha`.
        optimizer: "adamw" or another of `ADAM`, "sgd", "soap" for `einlinear.mup.Blockwise`, or "muon":
            `einlinear.mup.Muon` moves matrices by Muon (after arXiv 2310.17813, condition 1), the rest by AdamW, at the
            same `lr` (arXiv 2502.16982, section 2.2).
        weight_decay: of parameters with two or more dimensions, in the dense base model. None leaves it to the
            optimizer, which takes one for all of them (torch's AdamW: 0.01).
        decay: "independent": every full matrix shrinks by lr * weight_decay in a step, whatever its width and
            structure. "coupled", torch's own: by the learning rate of its group * weight_decay, and a product of k
            factors by k times that.
        eps: of Adam, for gradients of the dense base model; groups have it times the size that their gradients are
            expected to have over that. None leaves it to the optimizer, at one value for all. Not for Muon and SGD.
        alpha: 0.5 to 1, in models deeper than the base: their residual branches must be multiplied by
            (base depth / depth)^alpha, which is left to the model. With 1, learning rates do not change with the depth
            (CompleteP, arXiv 2505.01618); with less, those of Adam and Muon by (depth / base depth)^(alpha - 1).
        structure_aware: False gives every factor the multiplier of a dense layer, as a control.
        lr_scale: glob on qualified names -> an additional multiplier; the first that matches counts.
        roles: glob on qualified names -> "input" (tables such as embeddings), "hidden" or "output" (matrices) or
            "vector" (biases, norms, scales: no decay). The first match counts, before descriptions and inference.
        hidden: a glob, or several, on the matrices that Muon takes. Default: all.
        product: whether Muon moves the two factors of a term together, for what they do to their product.

    Returns:
        Groups with "params", "param_names", "lr", "lr_mult" (lr over the argument lr), "weight_decay" and "eps" if
        given, and "inferred", the names of parameters whose role was inferred. Groups of matrices for Muon and SOAP
        have "matrix_view" (order of axes, fan-out and fan-in), those for Muon "update_scale" (the factor of a unit
        spectral norm). In groups of products, first and second factors alternate, "matrix_view" has both their views,
        and "gram_views" as well.

    Raises:
        ValueError: an unknown optimizer or `decay`, `alpha` out of range, `hidden` or `product` without Muon, a term of
            three or more factors with `product`, or of two of which Muon would have only one, a glob that matches none,
            parameters that FSDP1 has flattened, that the base lacks, or whose role is unknown.

    Example:
        >>> import torch, einlinear as el
        >>> layer, base = el.Linear(256, 256, "btt"), torch.nn.Linear(64, 64)
        >>> groups = el.param_groups(layer, lr=1e-3, base=base, weight_decay=0.1)
        >>> [(g["param_names"], g["lr_mult"], g["weight_decay"]) for g in groups]
        [(['A', 'B'], 2.0, 0.025), (['bias'], 1.0, 0.0)]
    """
    if optimizer not in (*ADAM, "sgd", "muon", "soap"):
        raise ValueError(f"optimizer must be 'sgd', 'muon', 'soap' or one of {', '.join(ADAM)}, not {optimizer!r}")
    if product and optimizer != "muon":
        raise ValueError(f"product=True is for Muon, but the optimizer is {optimizer!r}")
    if decay not in DECAYS:
        raise ValueError(f"decay must be {' or '.join(map(repr, DECAYS))}, not {decay!r}")
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0.5 to 1, not {alpha}")
    params, shapes, depths = _resolve(model, base, roles)
    scales, hidden_globs = as_rules(lr_scale, "lr_scale"), as_globs("*" if hidden is None else hidden, "hidden")
    check_matches(scales, params, "lr_scale")
    if hidden is not None:
        if optimizer != "muon":
            raise ValueError(f"hidden names the matrices for Muon, but the optimizer is {optimizer!r}")
        check_matches(hidden_globs, [p for p in params if p.role.is_matrix], "hidden")
    _warn_of_tied(params, shapes)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in params:
        muon = optimizer == "muon" and p.role.is_matrix and any(p.matches(glob) for glob in hidden_globs)
        rule: Rule = "sgd" if optimizer == "sgd" else "soap" if optimizer == "soap" and p.role.is_matrix else "adam"
        if muon:
            rule = "muon_product" if product else "muon"
        growth = Growth(p.full_shape, shapes.get(p.key, p.full_shape), depths[p.key], alpha)
        multiplier = lr_multiplier(p.role, rule, growth, structure_aware)
        multiplier *= next((scale for glob, scale in scales.items() if p.matches(glob)), 1.0)
        config: dict[str, Any] = {"lr": lr * multiplier, "lr_mult": multiplier}
        if p.role.kind == "vector":
            config["weight_decay"] = 0.0
        elif weight_decay is not None:
            config["weight_decay"] = weight_decay * decay_multiplier(p.role, decay, multiplier)
        if eps is not None and rule in ("adam", "soap"):
            config["eps"] = eps * eps_multiplier(p.role, growth)
        if muon:
            # 0.2 is the root mean square of Adam's updates over the learning rate (arXiv 2502.16982, section 2.2)
            config |= {"matrix_view": p.matrix_view, "update_scale": 0.2 * math.sqrt(max(growth.base_shape))}
            config |= product_of(p) if product else {}
        elif rule == "soap":
            config["matrix_view"] = p.matrix_view
        # Muon takes equal shapes together, and no optimizer takes tensors and DTensors together
        alike = None if not muon else product_shapes(p) if "gram_views" in config else p.shape
        key = (*config.items(), alike, type(p.tensor))
        group = groups.setdefault(key, {"params": [], "param_names": [], **config})
        group["params"].append(p.tensor)
        group["param_names"].append(p.name)
        if p.is_inferred:
            group.setdefault("inferred", []).append(p.name)
    check_pairs(groups.values(), params)
    return list(groups.values())


@torch.no_grad()
def init_(model: nn.Module, *, base: Base = None, zero: Globs = None, roles: RoleGlobs = None) -> nn.Module:
    """Initialise a model in place, with the structure-aware standard deviations of muP, and return it.

    Every matrix has standard deviation sqrt(min(fan_in, fan_out)) / fan_in. Biases of these layers and routers of
    mixtures are zero. Other vectors, tables, and matrices whose role was only inferred stay as they are, except stacks
    of experts. An embedding that shares its weight with a head is drawn as the head.

    Args:
        model: any model `param_groups` takes, also on the meta device or with DTensors.
        base, roles: as for `param_groups`; `base` is only checked.
        zero: a glob, or several, on qualified names of the layers that start at zero, all others are drawn; of a
            structured layer only the last factor is set to zero. Default (None): layers that are zero now, such as
            heads, stay zero and are logged, unless all matrices are zero, as after `to_empty`.

    Raises:
        ValueError: as `param_groups`, and parameters that DeepSpeed's ZeRO-3 or FSDP1 has sharded.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> bool(el.init_(model, zero="2")[2].weight.any())
        False
    """
    params, *_ = _resolve(model, base, roles)
    _check_not_sharded(params)
    matrices = [p for p in params if p.role.is_matrix]
    if zero is None:
        zeros = _zero_parameters([p for p in matrices if not p.role.shares_input_with])
        if zeros:
            logger.info("init_ leaves at zero: %s; zero=() draws them", _listed(zeros))
    else:
        globs = as_globs(zero, "zero")
        check_matches(globs, matrices, "zero")
        zeros = [p for p in matrices if p.is_last_factor and any(p.matches(glob) for glob in globs)]
    for module in model.modules():
        if isinstance(module, Factored):
            module.reset_parameters()
    drawn = [p for p in matrices if not p.is_inferred or p.role.stacked]
    biases = {f"{name.removesuffix('weight')}bias" for p in drawn for name in p.names}
    for p in drawn:
        if p.role.structure is None:
            nn.init.normal_(p.tensor, std=p.init_std)
    for module in model.modules():
        if isinstance(module, Mixture):
            module.reset_router()
    for p in (*zeros, *(p for p in params if not p.role.is_matrix and p.name in biases)):
        nn.init.zeros_(p.tensor)
    return model


def _warn_of_tied(params: Sequence[Parameter], shapes: Shapes) -> None:
    """Warn of heads tied to embeddings that start so large that steps grow with the width."""
    for p in params:
        is_full = type(p.tensor) is nn.Parameter and tuple(p.tensor.shape) == p.shape and not p.tensor.is_meta
        if not (p.is_tied and is_full and p.role.is_matrix) or shapes[p.key][1] == p.role.in_features:
            continue
        size = float(p.tensor.detach().float().square().mean().sqrt())
        if size > 2 * p.init_std:
            wrong = f"Its entries have the size {size:.2g}, where a head starts at {p.init_std:.2g}"
            advice = "el.init_ draws it as a head; or multiply the logits by base width / width, and pass roles="
            what = f"{wrong}: logits will grow with the width. {advice}"
            logger.warning("%s is shared by an embedding and a head. %s{%r: 'input'}", p.name, what, p.name)


def _resolve(
    model: nn.Module, base: Base, roles: RoleGlobs
) -> tuple[list[Parameter], dict[str, Sequence[int]], dict[str, float]]:
    """Return every parameter with its role, described or inferred; and by key, shapes in the base and depth ratios."""
    declared = parameters(model, roles)
    current: Shapes = {p.key: p.full_shape for p in declared}
    of_base = current if base is None else load_shapes(base, roles)
    shapes, depths = find_shapes(declared, of_base), depth_ratios(current, of_base)
    params: list[Parameter] = []
    for p in declared:
        if p.role == UNKNOWN:
            in_base = shapes.get(p.key, p.shape)
            p = p.inferred(None if base is None else in_base)
            if p.role.is_matrix:
                role = matrix_role(in_base, p.role.stacked, p.transposed)
                shapes[p.key] = [role.out_features, role.in_features]
        params.append(p)
    if unknown := [p for p in params if p.role == UNKNOWN]:
        raise ValueError(
            f"the role of these parameters is unknown: {_listed(unknown)}. Give it with roles={{glob: role}}: 'input' "
            "for tables such as positions, 'vector' for norms and scales, 'hidden' for matrices of shape (out, in)"
        )
    tables = [p for p in params if p.is_inferred and not p.role.is_matrix]
    matrices = [p for p in params if p.is_inferred and p.role.is_matrix]
    tied = [p for p in params if p.is_tied]
    roles_taken = ("vectors or tables", "matrices", "matrices, though embeddings are tied to them")
    for taken_for, these in zip(roles_taken, (tables, matrices, tied)):
        if these:
            logger.info("taken for %s: %s; override with roles={glob: role}", taken_for, _listed(these))
    return params, shapes, depths


def _listed(params: Sequence[Parameter]) -> str:
    more = f" and {len(params) - 10} more" if len(params) > 10 else ""
    return ", ".join(f"{p.name} {p.shape}" for p in params[:10]) + more


def _check_not_sharded(params: Sequence[Parameter]) -> None:
    """Raise ValueError for parameters of which this process could draw only a part."""
    for p in params:
        if tuple(p.tensor.shape) == p.shape:
            continue
        by, gather, first = "FSDP1", "FullyShardedDataParallel.summon_full_params(model)", "FullyShardedDataParallel"
        if hasattr(p.tensor, "ds_shape"):
            by, first = "DeepSpeed's ZeRO-3", "deepspeed.initialize, on a model made outside of deepspeed.zero.Init"
            gather = "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
        advice = f"Call init_ within `with {gather}:`, or before {first}"
        raise ValueError(f"{p.name} of shape {p.shape} is sharded by {by}. {advice}")


def _zero_parameters(matrices: Sequence[Parameter]) -> list[Parameter]:
    """Return the last zero factor of every term of the layers that are zero; nothing if all layers are zero."""
    layers: dict[tuple[str, Any], list[list[Parameter]]] = {}
    for p in matrices:
        terms = layers.setdefault((p.key, p.role.structure), [[]])
        terms[-1].append(p)
        if p.is_last_factor:
            terms.append([])
    zero_layers = []
    for terms in layers.values():
        zeros = [[p for p in term if not p.tensor.is_meta and not p.tensor.any()] for term in terms if term]
        if all(zeros):
            zero_layers.append([term[-1] for term in zeros])
    none_decided = len(layers) > 1 and len(zero_layers) == len(layers)
    return [] if none_decided else [p for zeros in zero_layers for p in zeros]
