"""Swap the linear layers of a model for structured ones, and back.

Layers are chosen by globs on their qualified names. What is not converted is never passed over in silence: the report
lists it with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from einlinear.nn import Linear
from einlinear.nn.linear import features, is_conv1d
from einlinear.nn.names import as_globs, check_globs
from einlinear.structures import DoesNotFit
from einlinear.structures.spec import check_spec
from einlinear.structures.spec import structure as make_structure


@dataclass(frozen=True)
class Conversion:
    """One converted layer. `params` and `macs` are those of the weight; `error` is relative, in Frobenius norm."""

    name: str
    before: str
    after: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    error: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What became of every layer that was matched: `converted`, and `skipped` as (name, reason)."""

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def params_before(self) -> int:
        return sum(c.params_before for c in self.converted)

    @property
    def params(self) -> int:
        return sum(c.params for c in self.converted)

    @property
    def macs_before(self) -> int:
        return sum(c.macs_before for c in self.converted)

    @property
    def macs(self) -> int:
        return sum(c.macs for c in self.converted)

    def __str__(self) -> str:
        rows = [("layer", "before", "after", "params", "MACs", "error")]
        for c in self.converted:
            error = "" if c.error is None else f"{c.error:.3g}"
            params, macs = f"{c.params_before:,} -> {c.params:,}", f"{c.macs_before:,} -> {c.macs:,}"
            rows.append((c.name, c.before, c.after, params, macs, error))
        total_params = f"{self.params_before:,} -> {self.params:,}"
        rows.append(("total", "", "", total_params, f"{self.macs_before:,} -> {self.macs:,}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] = "*",
    weights: str = "fresh",
    normalize: bool = False,
) -> ConversionReport:
    """Replace linear layers by structured ones, in place.

    `torch.nn.Linear` and transformers' Conv1D are converted. Layers that share a module or a weight share their factors
    afterwards. Bias, device, dtype, requires_grad and training mode are kept.

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
    linears = _layers(
        model, "el.Linear.from_dense(layer, structure)", lambda m: isinstance(m, nn.Linear | Linear) or is_conv1d(m)
    )
    check_globs(wanted, list(linears), "layers", "linear layer")
    check_globs(plan, list(linears), "structure", "linear layer")
    matched = {
        name: next(spec for glob, spec in plan.items() if fnmatchcase(name, glob))
        for name in linears
        if any(fnmatchcase(name, glob) for glob in wanted) and any(fnmatchcase(name, glob) for glob in plan)
    }
    new, converted, skipped = _build(model, linears, matched, weights, normalize)
    return _apply(model, new, converted, skipped, "no layer matches layers and structure")


def densify(model: nn.Module) -> ConversionReport:
    """Replace every structured layer by the `torch.nn.Linear` that computes the same function, in place.

    Layers that share a module or all their factors share their weight afterwards. Bias, device, dtype, training mode
    and requires_grad are kept; a weight is frozen if all its factors were.

    Returns:
        What was done to every layer, and what was skipped for which reason, such as hooks, which would be lost.

    Raises:
        ValueError: there is no structured layer inside the model, or none that could be replaced.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 64, "btt"))
        >>> report = el.densify(model)
        >>> report.params_before, report.params
        (1024, 4096)
        >>> model[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    structured = _layers(model, "layer.to_dense()", lambda m: isinstance(m, Linear))
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    skipped: list[tuple[str, str]] = []
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    factors = {name: tuple(map(id, layer.weight_parameters())) for name, layer in structured.items()}
    hooked = {factors[name] for name, layer in structured.items() if _has_hooks(layer)}
    for name, layer in structured.items():
        if factors[name] in hooked:
            skipped.append((name, "it, or a layer that shares its factors, has hooks, which would be lost"))
        elif id(layer) not in new:
            dense = layer.to_dense()
            dense.weight = weights.setdefault(factors[name], dense.weight)
            new[id(layer)] = dense
            s, entries = layer.structure, layer.in_features * layer.out_features
            converted.append(Conversion(name, s.spec, _describe(dense), s.params, entries, s.macs, entries))
    return _apply(model, new, converted, skipped, "there is no structured layer in the model")


def _build(
    model: nn.Module, linears: Mapping[str, nn.Module], matched: Mapping[str, str], weights: str, normalize: bool
) -> tuple[dict[int, nn.Module], list[Conversion], list[tuple[str, str]]]:
    """The new modules by the id of the old, and what to report. The model is not touched."""
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    skipped: list[tuple[str, str]] = []
    by_weight: dict[tuple[int, str], Linear] = {}
    owners = _owners(model)
    uncalled = {
        id(module.out_proj): "nn.MultiheadAttention reads its weight and never calls it: nothing would be saved"
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for name, spec in matched.items():
        old: Any = linears[name]
        if id(old) in new:
            continue
        reason = uncalled.get(id(old)) or _reason_to_skip(old) or _tied_elsewhere(old, owners, linears, matched, spec)
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
    layer = Linear(fan_in, fan_out, s, old.bias is not None, normalize, old.weight.device, old.weight.dtype)
    for parameter in layer.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(old.bias.requires_grad)
    return layer.train(old.training)


@torch.no_grad()
def _conversion(name: str, old: Any, layer: Linear, weights: str) -> Conversion:
    error = None
    if weights == "project":
        weight = old.weight.T if is_conv1d(old) else old.weight
        difference = (layer.dense_weight().float() - weight.float()).norm()
        error = float(difference / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    s, entries = layer.structure, layer.in_features * layer.out_features
    return Conversion(name, _describe(old), s.spec, entries, s.params, entries, s.macs, error)


def _layers(model: nn.Module, instead: str, is_one: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """The layers of a kind, by every qualified name they have."""
    if is_one(model):
        raise ValueError(f"the model is itself a linear layer, which cannot be replaced in place: use {instead}")
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_one(module)}


def _reason_to_skip(module: nn.Module) -> str | None:
    if isinstance(module, Linear):
        return f"is already structured: {module.structure.spec}"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"is a {type(module).__name__}, a subclass of nn.Linear that may be used in other ways"
    return "has hooks, which would be lost" if _has_hooks(module) else None


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of any kind, on calls or on its state_dict, or its parameters have."""
    of_module = [value for name, value in vars(module).items() if name.endswith("_hooks")]
    of_parameters = [hooks for p in module.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    return any(of_module + of_parameters)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Which modules hold a parameter, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


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
        if not same or _reason_to_skip(other):
            return f"its weight is tied to {name}, which is not converted to the same structure"
    return None


def _apply(
    model: nn.Module,
    new: Mapping[int, nn.Module],
    converted: Sequence[Conversion],
    skipped: Sequence[tuple[str, str]],
    otherwise: str,
) -> ConversionReport:
    """Put the new modules into the model. If there are none it is an error, for the reasons found or for another."""
    if not converted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or otherwise
        raise ValueError(f"no layer could be converted: {reasons}")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])
    return ConversionReport(tuple(converted), tuple(skipped))


def _describe(module: nn.Module) -> str:
    return "{} {} -> {}".format(type(module).__name__, *features(module))
