"""Swap the linear layers of a model for structured ones.

Layers are chosen by globs on their qualified names. What is not converted is never passed over in silence: the report
lists it with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from einlinear.conversion.replace import describe, replace_in
from einlinear.conversion.report import Conversion, ConversionReport
from einlinear.conversion.suitable import (
    fresh,
    fused_experts,
    linear_layers,
    owners_of,
    reason_to_skip,
    uncalled_layers,
)
from einlinear.nn import Linear
from einlinear.nn.known import features, is_conv1d
from einlinear.nn.names import as_globs, check_globs
from einlinear.structures import DoesNotFit
from einlinear.structures.spec import check_spec
from einlinear.structures.spec import structure as make_structure


def convert(
    model: nn.Module,
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] = "*",
    weights: str = "fresh",
    normalize: bool = False,
) -> ConversionReport:
    """Replace linear layers by structured ones, in place.

    `torch.nn.Linear` and transformers' Conv1D are converted; experts whose weights are stacked in one parameter are
    skipped. Layers that share a module or a weight share their factors afterwards. Bias, device, dtype, requires_grad
    and training mode are kept.

    Args:
        model: any module that has linear layers inside.
        structure: of all matched layers; or glob on qualified names -> structure, the first that matches counts. Globs
            are those of fnmatch, on the whole name: "*.attn.*" matches "blocks.0.attn.q" but not "attn.q" of a model
            whose attn is at the top; "*attn.*" matches both.
        layers: a glob, or several, on qualified names: which layers to consider at all.
        weights: "fresh" draws new factors (and zero biases), "project" takes the closest to the layer's own weight.
        normalize: of the new layers, see `Linear`; of fresh ones only.

    Returns:
        What was done to every matched layer, and what was skipped for which reason; print it.

    Raises:
        ValueError: a structure that is unknown, a glob that matches no linear layer, layers on the meta device to
            project, normalize with weights="project", or no layer at all that could be converted. Nothing is changed
            then.
        TypeError: a structure that is not text.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.convert(model, {"0": "btt", "*": "low_rank(rank=8)"}, weights="project")
        >>> [(c.name, c.after, c.params) for c in report.converted]
        [('0', 'btt', 3072), ('2', 'low_rank(rank=8)', 2560)]
    """
    if weights not in ("fresh", "project"):
        raise ValueError(f"weights must be 'fresh' or 'project', not {weights!r}")
    if normalize and weights == "project":
        raise ValueError("normalize=True is for weights='fresh': it would change what a projected layer computes")
    plan = dict(structure) if isinstance(structure, Mapping) else {"*": structure}
    if not plan:
        raise ValueError("the mapping of globs to structures is empty")
    for spec in plan.values():
        check_spec(spec)
    wanted = as_globs(layers, "layers")
    linears = linear_layers(model)
    fused = fused_experts(model)
    check_globs(wanted, [*linears, *fused], "layers", "linear layer")
    check_globs(plan, [*linears, *fused], "structure", "linear layer")

    def is_matched(name: str) -> bool:
        return all(any(fnmatchcase(name, glob) for glob in globs) for globs in (wanted, plan))

    matched = {
        name: next(spec for glob, spec in plan.items() if fnmatchcase(name, glob))
        for name in linears
        if is_matched(name)
    }
    new, converted, skipped = _build(model, linears, matched, weights, normalize)
    skipped += [(name, reason) for name, reason in fused.items() if is_matched(name)]
    return replace_in(model, new, converted, skipped, "no layer matches layers and structure")


def _build(
    model: nn.Module, linears: Mapping[str, nn.Module], matched: Mapping[str, str], weights: str, normalize: bool
) -> tuple[dict[int, nn.Module], list[Conversion], list[tuple[str, str]]]:
    """The new modules by the id of the old, and what to report. The model is not touched."""
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    skipped: list[tuple[str, str]] = []
    by_weight: dict[tuple[int, str], Linear] = {}
    owners = owners_of(model)
    uncalled = uncalled_layers(model)
    for name, spec in matched.items():
        old: Any = linears[name]
        if id(old) in new:
            continue
        reason = uncalled.get(id(old)) or reason_to_skip(old) or _tied_elsewhere(old, owners, linears, matched, spec)
        if reason is None:
            try:
                layer = _converted(old, spec, weights, normalize)
            except DoesNotFit as error:
                reason = str(error)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if reason is not None:
            skipped.append((name, reason))
            continue
        first = by_weight.setdefault((id(old.weight), spec), layer)
        for shared, parameter in first.named_parameters():
            if shared != "bias":
                setattr(layer, shared, parameter)
        new[id(old)] = layer
        converted.append(_conversion(name, old, layer, weights))
    return new, converted, skipped


def _converted(old: Any, spec: str, weights: str, normalize: bool) -> Linear:
    fan_in, fan_out = features(old)
    s = make_structure(spec, fan_in, fan_out)
    if weights == "project":
        if old.weight.is_meta:
            raise ValueError("layers on the meta device have no weight to project: load it first, or weights='fresh'")
        return Linear.from_dense(old, s)
    return fresh(old, s, normalize)


@torch.no_grad()
def _conversion(name: str, old: Any, layer: Linear, weights: str) -> Conversion:
    error = None
    if weights == "project":
        weight = old.weight.T if is_conv1d(old) else old.weight
        difference = (layer.dense_weight().float() - weight.float()).norm()
        error = float(difference / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    s, entries = layer.structure, layer.in_features * layer.out_features
    return Conversion(name, describe(old), s.spec, entries, s.params, entries, s.macs, error)


def _tied_elsewhere(
    module: Any,
    owners: Mapping[int, list[tuple[str, nn.Module]]],
    linears: Mapping[str, nn.Module],
    matched: Mapping[str, str],
    spec: str,
) -> str | None:
    """Why a shared weight cannot be converted: not all of its owners become the same structure."""
    for name, other in owners[id(module.weight)]:
        if other is module:
            continue
        same = name in linears and matched.get(name) == spec and type(other) is type(module)
        if not same or reason_to_skip(other):
            return f"its weight is tied to {name}, which is not converted to the same structure"
    return None
