"""Conversion of the linear layers of a model to structured ones, and back to dense ones.

Globs on qualified names choose the layers. The report lists every chosen layer that is not converted, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.conversion.coverage import measure_coverage
from einlinear.conversion.eligibility import has_hooks, reason_to_skip
from einlinear.conversion.replacement import (
    describe,
    fused_experts,
    layers_of,
    linear_layers,
    owners_of,
    replace_layers,
    structured_like,
)
from einlinear.conversion.usage import uncalled_layers
from einlinear.nn import Linear, MoELinear
from einlinear.nn.layer_kinds import as_class, features, weight_matrix
from einlinear.nn.model_call import Batch
from einlinear.nn.moe import Experts
from einlinear.nn.moe.mixture import check_experts
from einlinear.nn.names import as_globs, check_globs, matches_any
from einlinear.structures import DoesNotFit
from einlinear.structures.spec import check_spec
from einlinear.structures.spec import structure as make_structure


def convert(
    model: nn.Module,
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    weights: str = "init",
    *,
    normalize: bool | str | Sequence[str] = False,
    gamma: bool | str | Sequence[str] = True,
    experts: int | None = None,
    active: int | None = None,
    classes: type[nn.Module] | Sequence[type[nn.Module]] = (),
    example_input: Batch | None = None,
) -> ConversionReport:
    """Replace linear layers by structured ones, in place.

    `torch.nn.Linear`, subclasses that compute the same, and transformers' Conv1D are converted; experts whose weights
    are stacked in one parameter are skipped. Layers that share a module or a weight share their factors afterwards.
    Device, dtype, requires_grad and training mode are kept.

    Layers that the model never calls, because a module above them computes with their weights itself, are left alone
    (`example_input`).

    Args:
        model: any module that has linear layers inside.
        structure: of all matched layers; or glob on qualified names -> structure, the first that matches counts. Globs
            are those of fnmatch, on the whole name: "*.attn.*" matches "blocks.0.attn.q" but not "attn.q" of a model
            whose attn is at the top; "*attn.*" matches both.
        layers: a glob, or several, on qualified names: which layers to consider at all.
        exclude: a glob, or several: which of these to leave out.
        weights: "init" draws new factors and sets biases to zero; a layer whose weight is zero keeps its bias, and gets
            a structured weight of zero, whose factors but the last are drawn. "project" takes the closest to the
            layer's own weight, and keeps the bias.
        normalize: whether the new layers are normalised, see `Linear`; with weights="init". True: all but those of the
            structure "dense"; a glob, or several: those that match, "dense" ones included.
        gamma: which normalised layers have gammas: all, none, or those that a glob, or several, match. Queries and keys
            that are normalised need none.
        experts: the number of experts of every new layer, an `einlinear.MoELinear`. With weights="init".
        active: the number of experts per token; None: 2.
        classes: subclasses of `torch.nn.Linear` that are converted whatever they compute. Those whose forward pass
            agrees with that of `torch.nn.Linear` on random inputs, and that have no other parameters, are converted
            anyway.
        example_input: an input of the model: a tensor, a sequence of positional arguments or a mapping of named ones.
            The model is run on it once, to see which layers it calls. None: the source code of its modules is read,
            which finds the same in most cases.

    Returns:
        A report to print: every matched layer, converted or skipped for a reason, and the share of the model's
        parameters that was considered.

    Raises:
        ValueError: a structure that is unknown, a glob that matches no linear layer, layers on the meta device to
            project, arguments that contradict each other, or no layer at all that could be converted. The model is
            unchanged then.
        TypeError: a structure that is not text; classes that are not subclasses of `torch.nn.Linear`.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.convert(model, {"0": "btt", "*": "low_rank(rank=8)"}, weights="project")
        >>> [(c.name, c.after, c.params) for c in report.converted]
        [('0', 'btt', 3072), ('2', 'low_rank(rank=8)', 2560)]

        All but the last layer become mixtures of 8 experts:

        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.convert(model, "btt", exclude="2", experts=8, active=2)
        >>> [type(layer).__name__ for layer in model]
        ['MoELinear', 'ReLU', 'Linear']
    """
    plan = dict(structure) if isinstance(structure, Mapping) else {"*": structure}
    if not plan:
        raise ValueError("the mapping of globs to structures is empty")
    for text in plan.values():
        check_spec(text)
    linears, fused = linear_layers(model), fused_experts(model)
    globs = {"layers": as_globs(layers, "layers"), "structure": plan, "exclude": as_globs(exclude, "exclude")}
    if not isinstance(normalize, bool):
        globs["normalize"] = as_globs(normalize, "normalize")
    if not isinstance(gamma, bool):
        globs["gamma"] = as_globs(gamma, "gamma")
    _check_new_weights(weights, normalize, gamma, experts, active)
    for argument, group in globs.items():
        check_globs(group, [*linears, *fused], argument, "linear layer")

    matched: dict[str, str] = {}
    for name in (*linears, *fused):
        spec = next((spec for glob, spec in plan.items() if fnmatchcase(name, glob)), None)
        if spec is not None and matches_any(name, globs["layers"]) and not matches_any(name, globs["exclude"]):
            matched[name] = spec
    mixture = {} if experts is None else {"experts": experts, "active": 2 if active is None else active}

    @torch.no_grad()
    def make(name: str, old: Any, spec: str) -> Linear | MoELinear:
        """Return the layer that replaces a dense one."""
        s = make_structure(spec, *features(old))
        if weights == "project" and old.weight.is_meta:
            raise ValueError("layers on the meta device have no weight to project: load it first, or weights='init'")
        is_zero = _is_zero(old.weight)
        if weights == "project" and not is_zero:
            projected = Linear.from_dense(old, s)
            projected.dense_class = type(old)
            return projected
        is_normalized = s.spec != "dense" if normalize is True else matches_any(name, globs.get("normalize", ()))
        has_gamma = gamma is True or matches_any(name, globs.get("gamma", ()))
        layer: Linear | MoELinear = structured_like(old, s, normalize=is_normalized, gamma=has_gamma, **mixture)
        if is_zero:
            layer.zero_last_factors()
            if layer.bias is not None:
                layer.bias.copy_(old.bias)
        return layer

    uncalled = uncalled_layers(model, None if example_input is None else [example_input])
    new, converted, skipped = _new_layers(model, linears, matched, uncalled, _as_classes(classes), make, weights)
    skipped += [(name, reason) for name, reason in fused.items() if name in matched]
    coverage = measure_coverage(model, [linears[c.name] for c in converted])
    report = replace_layers(
        model, new, converted, skipped, "no layer matches layers and structure, and is not excluded"
    )
    return replace(report, coverage=coverage)


def densify(model: nn.Module) -> ConversionReport:
    """Replace every structured layer by the dense one that computes the same function, in place.

    The dense layer is a `torch.nn.Linear`, or of the class that the structured layer replaced: transformers' Conv1D, or
    a subclass of `torch.nn.Linear` without a constructor of its own. Layers that share a module or all their factors
    share their weight afterwards. Bias, device, dtype, training mode and requires_grad are kept; a weight is frozen if
    all its factors were.

    Returns:
        A report on every layer, converted or skipped for a reason, such as hooks, which would be lost.

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
    structured = layers_of(model, "layer.to_dense()", lambda m: isinstance(m, Linear))
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    mixtures = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    skipped = [(name, "is a mixture of experts, which no dense layer computes") for name in mixtures]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    factors = {name: tuple(map(id, layer.weight_parameters())) for name, layer in structured.items()}
    hooked = {factors[name] for name, layer in structured.items() if has_hooks(layer)}
    for name, layer in structured.items():
        if factors[name] in hooked:
            skipped.append((name, "it, or a layer that shares its factors, has hooks, which would be lost"))
        elif id(layer) not in new:
            dense: Any = as_class(layer.to_dense(), layer.dense_class)
            dense.weight = weights.setdefault(factors[name], dense.weight)
            new[id(layer)] = dense
            s, entries = layer.structure, layer.in_features * layer.out_features
            converted.append(Conversion(name, s.spec, describe(dense), s.params, entries, s.macs, entries))
    return replace_layers(model, new, converted, skipped, "there is no structured layer in the model")


def _check_new_weights(weights: str, normalize: Any, gamma: Any, experts: int | None, active: int | None) -> None:
    """Raise ValueError for arguments of `convert` that contradict each other."""
    if weights not in ("init", "project"):
        raise ValueError(f"weights must be 'init' or 'project', not {weights!r}")
    if normalize and weights == "project":
        raise ValueError("normalize is for weights='init': it would change what a projected layer computes")
    if gamma is not True and not normalize:
        raise ValueError(f"gamma={gamma!r} is for layers that are normalised: give normalize as well")
    if experts is None and active is not None:
        raise ValueError(f"active={active} is for mixtures of experts: give experts as well")
    if experts is not None and weights == "project":
        raise ValueError("experts have new weights: give weights='init', or leave experts out to project the layers")
    if experts is not None:
        check_experts(experts, 2 if active is None else active)


def _new_layers(
    model: nn.Module,
    linears: Mapping[str, Any],
    matched: Mapping[str, str],
    uncalled: Mapping[int, str],
    classes: tuple[type[nn.Module], ...],
    make: Callable[[str, Any, str], Linear | MoELinear],
    weights: str,
) -> tuple[dict[int, nn.Module], list[Conversion], list[tuple[str, str]]]:
    """Return the new modules by the id of the old, the converted and the skipped layers. The model is unchanged."""
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    skipped: list[tuple[str, str]] = []
    by_weight: dict[tuple[int, str], nn.Module] = {}
    owners = owners_of(model)
    reasons = {id(layer): reason_to_skip(layer, classes) for layer in linears.values()}

    def tied_elsewhere(module: Any, spec: str) -> str | None:
        """Return the reason to skip a shared weight: not all of its owners get the same structure."""
        for name, other in owners[id(module.weight)]:
            alike = name in linears and matched.get(name) == spec and type(other) is type(module)
            if other is not module and (not alike or reasons[id(other)]):
                return f"its weight is tied to {name}, which is not converted to the same structure"
        return None

    for name, old in linears.items():
        spec = matched.get(name)
        if spec is None or id(old) in new:
            continue
        reason = reasons[id(old)] or tied_elsewhere(old, spec) or uncalled.get(id(old))
        if reason is None:
            try:
                layer = make(name, old, spec)
            except DoesNotFit as error:
                reason = str(error)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if reason is not None:
            skipped.append((name, reason))
            continue
        first = by_weight.setdefault((id(old.weight), spec), layer)
        for key, parameter in first.named_parameters():
            if key != "bias":
                setattr(layer, key, parameter)
        new[id(old)] = layer
        converted.append(_conversion(name, old, layer, weights))
    return new, converted, skipped


@torch.no_grad()
def _conversion(name: str, old: Any, layer: Linear | MoELinear, weights: str) -> Conversion:
    s, entries = layer.structure, layer.in_features * layer.out_features
    after, params, macs, error = s.spec, s.params, s.macs, None
    if isinstance(layer, MoELinear):
        after = f"{layer.experts} experts of {s.spec}, {layer.active} active"
        params, macs = layer.experts * s.params + layer.router.numel(), layer.layer_info().macs or 0
    if weights == "project" and isinstance(layer, Linear):
        weight = weight_matrix(old).float()
        difference = (layer.dense_weight().float() - weight).norm()
        error = float(difference / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return Conversion(name, describe(old), after, entries, params, entries, macs, error, _is_zero(old.weight))


def _is_zero(weight: Tensor) -> bool:
    # the first row is enough for most weights
    return not weight.is_meta and not weight[:1].any() and not weight.any()


def _as_classes(value: type[nn.Module] | Sequence[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    classes = (value,) if isinstance(value, type) else value
    if not isinstance(classes, list | tuple) or not all(
        isinstance(c, type) and issubclass(c, nn.Linear) for c in classes
    ):
        raise TypeError(f"classes must be a subclass of torch.nn.Linear, or a list of such, not {value!r}")
    return tuple(classes)
