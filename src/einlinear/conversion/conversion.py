"""Swap the linear layers of a model for structured ones.

Layers are chosen by globs on their qualified names. What is not converted is never passed over in silence: the report
lists it with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.calling import Batch
from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.conversion.coverage import measure_coverage
from einlinear.conversion.replace import describe, replace_in
from einlinear.conversion.suitable import (
    fused_experts,
    linear_layers,
    mixture_like,
    owners_of,
    reason_to_skip,
    structured_like,
)
from einlinear.conversion.usage import uncalled_layers
from einlinear.nn import Linear, MoELinear
from einlinear.nn.foreign import features, is_conv1d
from einlinear.nn.moe.mixture import check_experts
from einlinear.nn.names import as_globs, check_globs
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
        normalize: of the new layers, see `Linear`; with weights="init". True: all but those of the structure "dense";
            a glob, or several: those that match, "dense" ones included.
        gamma: which normalised layers have gammas: all, none, or those that a glob, or several, match. Queries and keys
            that are normalised need none.
        experts: how many of them every new layer has: then it is an `einlinear.MoELinear`. With weights="init".
        active: how many experts a token goes to; None: 2.
        classes: subclasses of `torch.nn.Linear` that are converted whatever they compute. Those whose forward pass
            agrees with that of `torch.nn.Linear` on random inputs, and that have no other parameters, are converted
            anyway.
        example_input: what the model can be called with, a tensor, a sequence of positional arguments or a mapping of
            named ones. The model is run on it once, to see which layers it calls. None: the code of its modules tells
            the same in most cases.

    Returns:
        What was done to every matched layer, what was skipped for which reason, and the share of the model's parameters
        that was considered; print it.

    Raises:
        ValueError: a structure that is unknown, a glob that matches no linear layer, layers on the meta device to
            project, options that contradict each other, or no layer at all that could be converted. Nothing is changed
            then.
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
    for spec in plan.values():
        check_spec(spec)
    linears, fused = linear_layers(model), fused_experts(model)
    wanted, unwanted = as_globs(layers, "layers"), as_globs(exclude, "exclude")
    makes = _Maker(weights, _flag_or_globs(normalize, "normalize"), _flag_or_globs(gamma, "gamma"), experts, active)
    given = {"layers": wanted, "structure": plan, "exclude": unwanted, **makes.globs}
    for argument, globs in given.items():
        check_globs(globs, [*linears, *fused], argument, "linear layer")

    def is_matched(name: str) -> bool:
        return _matches(name, wanted) and _matches(name, plan) and not _matches(name, unwanted)

    matched = {
        name: next(spec for glob, spec in plan.items() if fnmatchcase(name, glob))
        for name in linears
        if is_matched(name)
    }
    uncalled = uncalled_layers(model, None if example_input is None else [example_input])
    new, converted, skipped = _build(model, linears, matched, uncalled, _as_classes(classes), makes)
    skipped += [(name, reason) for name, reason in fused.items() if is_matched(name)]
    coverage = measure_coverage(model, [linears[c.name] for c in converted])
    report = replace_in(model, new, converted, skipped, "no layer matches layers and structure, and is not excluded")
    return replace(report, coverage=coverage)


class _Maker:
    """Makes new layers as the arguments of `convert` say, which are checked first."""

    def __init__(
        self,
        weights: str,
        normalize: bool | list[str],
        gamma: bool | list[str],
        experts: int | None,
        active: int | None,
    ) -> None:
        if weights not in ("init", "project"):
            raise ValueError(f"weights must be 'init' or 'project', not {weights!r}")
        if normalize and weights == "project":
            raise ValueError("normalize is for weights='init': it would change what a projected layer computes")
        if gamma is not True and not normalize:
            raise ValueError(f"gamma={gamma!r} is for layers that are normalised: give normalize as well")
        if experts is None and active is not None:
            raise ValueError(f"active={active} is for mixtures of experts: give experts as well")
        if experts is not None and weights == "project":
            raise ValueError(
                "experts have new weights: give weights='init', or leave experts out to project the layers"
            )
        self.weights, self.normalize, self.gamma = weights, normalize, gamma
        self.experts, self.active = experts, 2 if active is None else active
        if experts is not None:
            check_experts(experts, self.active)

    @property
    def globs(self) -> dict[str, list[str]]:
        """Those among the arguments, by argument."""
        given = {"normalize": self.normalize, "gamma": self.gamma}
        return {argument: value for argument, value in given.items() if not isinstance(value, bool)}

    @torch.no_grad()
    def __call__(self, name: str, old: Any, spec: str) -> Linear | MoELinear:
        """The layer in the place of a dense one."""
        s = make_structure(spec, *features(old))
        is_zero = _is_zero(old.weight)
        if self.weights == "project":
            if old.weight.is_meta:
                raise ValueError(
                    "layers on the meta device have no weight to project: load it first, or weights='init'"
                )
            if not is_zero:
                projected = Linear.from_dense(old, s)
                projected.dense_class = type(old)
                return projected
        normalize = s.spec != "dense" if self.normalize is True else _is_on(self.normalize, name)
        gamma = _is_on(self.gamma, name)
        layer: Linear | MoELinear
        if self.experts is None:
            layer = structured_like(old, s, normalize, gamma)
        else:
            layer = mixture_like(old, s, self.experts, self.active, normalize, gamma)
        if is_zero:
            layer.zero_last_factors()
            if layer.bias is not None:
                layer.bias.copy_(old.bias)
        return layer


def _build(
    model: nn.Module,
    linears: Mapping[str, Any],
    matched: Mapping[str, str],
    uncalled: Mapping[int, str],
    classes: tuple[type[nn.Module], ...],
    makes: _Maker,
) -> tuple[dict[int, nn.Module], list[Conversion], list[tuple[str, str]]]:
    """The new modules by the id of the old, and what to report. The model is not touched."""
    new: dict[int, nn.Module] = {}
    converted: list[Conversion] = []
    skipped: list[tuple[str, str]] = []
    by_weight: dict[tuple[int, str], nn.Module] = {}
    owners = owners_of(model)
    reasons = {id(layer): reason_to_skip(layer, classes) for layer in linears.values()}
    for name, spec in matched.items():
        old = linears[name]
        if id(old) in new:
            continue
        reason = reasons[id(old)] or _tied_elsewhere(old, owners, linears, matched, reasons) or uncalled.get(id(old))
        if reason is None:
            try:
                layer = makes(name, old, spec)
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
        converted.append(_conversion(name, old, layer, makes.weights))
    return new, converted, skipped


@torch.no_grad()
def _conversion(name: str, old: Any, layer: Linear | MoELinear, weights: str) -> Conversion:
    s, entries = layer.structure, layer.in_features * layer.out_features
    after, params, macs, error = s.spec, s.params, s.macs, None
    if isinstance(layer, MoELinear):
        after = f"{layer.experts} experts of {s.spec}, {layer.active} active"
        params, macs = layer.experts * s.params + layer.router.numel(), layer.known().macs or 0
    if weights == "project" and isinstance(layer, Linear):
        weight = old.weight.T if is_conv1d(old) else old.weight
        difference = (layer.dense_weight().float() - weight.float()).norm()
        error = float(difference / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    return Conversion(name, describe(old), after, entries, params, entries, macs, error, _is_zero(old.weight))


def _tied_elsewhere(
    module: Any,
    owners: Mapping[int, list[tuple[str, nn.Module]]],
    linears: Mapping[str, nn.Module],
    matched: Mapping[str, str],
    reasons: Mapping[int, str | None],
) -> str | None:
    """Why a shared weight cannot be converted: not all of its owners become the same structure."""
    spec = next(spec for name, spec in matched.items() if linears[name] is module)
    for name, other in owners[id(module.weight)]:
        if other is module:
            continue
        same = name in linears and matched.get(name) == spec and type(other) is type(module)
        if not same or reasons[id(other)]:
            return f"its weight is tied to {name}, which is not converted to the same structure"
    return None


def _is_zero(weight: Tensor) -> bool:
    # the first row says it of most
    return not weight.is_meta and not weight[:1].any() and not weight.any()


def _flag_or_globs(given: bool | str | Sequence[str], argument: str) -> bool | list[str]:
    return given if isinstance(given, bool) else as_globs(given, argument)


def _is_on(given: bool | list[str], name: str) -> bool:
    return given if isinstance(given, bool) else _matches(name, given)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _as_classes(given: type[nn.Module] | Sequence[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    classes = (given,) if isinstance(given, type) else given
    if not isinstance(classes, list | tuple) or not all(
        isinstance(c, type) and issubclass(c, nn.Linear) for c in classes
    ):
        raise TypeError(f"classes must be a subclass of torch.nn.Linear, or a list of such, not {given!r}")
    return tuple(classes)
