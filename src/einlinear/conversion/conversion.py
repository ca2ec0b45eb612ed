"""Conversion of the linear layers of a model to structured ones, and back to dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.conversion_report import Conversion, ConversionReport, measure_coverage
from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.experts import (
    densified_experts,
    experts_conversion,
    experts_modules,
    reason_to_skip_experts,
)
from einlinear.conversion.replacement import (
    STRUCTURED_CLASSES,
    layers_of,
    linear_layers,
    modules_of,
    owners_of,
    replace_modules,
    set_config_ties,
    structured_class,
    structured_like,
)
from einlinear.conversion.structure_plan import match_structures
from einlinear.conversion.weight_usage import uncalled_layers
from einlinear.nn import Conv1d, Conv2d, Embedding, GatedExperts, MoELinear
from einlinear.nn.dense_layers import as_class, features, is_linear, weight_matrix
from einlinear.nn.interception import has_any_hooks
from einlinear.nn.model_call import Batch
from einlinear.nn.moe.mixture import Experts, check_experts
from einlinear.nn.names import matching, plain_modules
from einlinear.structures import DoesNotFit
from einlinear.structures.spec import structure as make_structure

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | Conv1d | Conv2d


def convert(
    model: nn.Module,
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    weights: str = "init",
    *,
    embeddings: str | Sequence[str] = (),
    convolutions: str | Sequence[str] = (),
    normalize: bool | str | Sequence[str] = False,
    gamma: bool | str | Sequence[str] = True,
    experts: int | None = None,
    active: int | None = None,
    classes: type[nn.Module] | Sequence[type[nn.Module]] = (),
    example_input: Batch | None = None,
) -> ConversionReport:
    """Replace linear layers by structured ones, in place.

    `torch.nn.Linear`, subclasses that compute the same, and transformers' Conv1D and stacks of gated experts
    (`einlinear.nn.GatedExperts`) are converted; layers that the model never calls are not. Device, dtype,
    requires_grad, training mode and shared weights are kept.

    Args:
        model: any module that has linear layers inside.
        structure: of all matched layers; or glob on qualified names -> structure, where the first match counts. Globs
            (fnmatch) match whole names: "*.attn.*" matches "blocks.0.attn.q" but not "attn.q"; "*attn.*" matches both.
            Names are those without wrappers such as those of `torch.compile` and peft.
        layers: a glob, or several, on qualified names: which linear layers to convert. None: all.
        exclude: a glob, or several: which of these to leave out.
        weights: "init" draws new factors and sets biases to zero, except for a layer whose weight is zero, which keeps
            weight and bias. "project" takes the closest to the layer's weight, and keeps the bias.
        embeddings: a glob, or several: which `torch.nn.Embedding` to convert to `einlinear.Embedding`. One that shares
            its weight with a head needs the structure of the head. New entries are as large as the old ones.
        convolutions: a glob, or several: which `torch.nn.Conv1d` and `Conv2d` of one group to convert as well.
        normalize: which new layers are normalised (`Linear`), with weights="init": none, all but those of the structure
            "dense" (True), or those that globs match, "dense" ones included.
        gamma: which normalised layers have gammas: all, none, or those that globs match. Queries and keys need none.
        experts: the number of experts of every new layer, an `einlinear.MoELinear`. With weights="init".
        active: the number of experts per token; None: 2.
        classes: subclasses of `torch.nn.Linear` that are converted even if they compute something else.
        example_input: a tensor, a sequence of positional arguments or a mapping of named ones. The model is run on it
            to see which layers it calls. None: the source code of its modules tells, in most cases.

    Returns:
        A report to print: every matched layer, converted or skipped for a reason, and their share of the model.

    Raises:
        ValueError: an unknown structure, a glob that matches no linear layer, layers on the meta device to project,
            arguments that contradict each other, or no layer that could be converted. The model is then unchanged.
        TypeError: a structure that is not text; classes that are not subclasses of `torch.nn.Linear`.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.convert(model, {"0": "btt", "*": "low_rank(rank=8)"}, weights="project")
        >>> [(c.name, c.after, c.params) for c in report.converted]
        [('0', 'btt', 3072), ('2', 'low_rank(rank=8)', 2560)]
    """
    # 1. check the arguments
    linears, stacks = linear_layers(model), experts_modules(model)
    # other kinds of layers are converted only if they are named
    named = matching(modules_of(model, nn.Embedding | Embedding), embeddings, "embeddings", "embedding")
    named |= matching(modules_of(model, _CONVOLUTIONS), convolutions, "convolutions", "convolution")
    _check_new_weights(weights, normalize, gamma, experts, active)
    normalized, with_gamma = (
        {} if isinstance(value, bool) else matching(linears | stacks, value, argument, "linear layer")
        for argument, value in (("normalize", normalize), ("gamma", gamma))
    )
    classes = _as_classes(classes)

    # 2. match layers with structures, and find those that no structure can replace
    matched = match_structures([*linears, *stacks], structure, layers, exclude, named)
    linears |= named
    reasons = _reasons_to_skip(model, linears, matched, classes, example_input)
    reasons |= {n: reason for n in matched.keys() & stacks if (reason := reason_to_skip_experts(stacks[n]))}
    if experts is not None:
        reasons |= {name: "has several experts already" for name in matched.keys() & stacks if name not in reasons}

    # 3. make the new layers
    mixture = {} if experts is None else {"experts": experts, "active": 2 if active is None else active}
    new, by_weight = dict[int, nn.Module](), dict[tuple[int, str], nn.Module]()
    converted, skipped = list[Conversion](), list[tuple[str, str]]()
    layers_by_name = linears | stacks
    # of an embedding and a head with one weight, the embedding says how large new entries are
    for name, spec in sorted(matched.items(), key=lambda item: item[0] not in named):
        old: Any = layers_by_name[name]
        if id(old) in new:
            continue
        if name in reasons:
            skipped.append((name, reasons[name]))
            continue
        try:
            s = spec if name in stacks else make_structure(spec, *features(old))
            is_normalized = getattr(s, "spec", s) != "dense" if normalize is True else name in normalized
            has_gamma = gamma is True or name in with_gamma
            config = {} if name in named else {"normalize": is_normalized, "gamma": has_gamma, **mixture}
            layer = (_new_experts if name in stacks else _new_layer)(old, s, weights, **config)
        except DoesNotFit as error:
            skipped.append((name, str(error)))
            continue
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        new[id(old)] = layer
        if name in stacks:
            converted.append(experts_conversion(name, old, layer, weights == "project"))
            continue
        # layers that shared a weight share its factors
        first = by_weight.setdefault((id(old.weight), spec), layer)
        for key, parameter in first.named_parameters():
            if key != "bias":
                setattr(layer, key, parameter)
        converted.append(_conversion(name, old, layer, weights))
    if not converted:
        raise _nothing_converted(skipped, "no layer matches layers and structure, and is not excluded")

    # 4. replace the old ones
    coverage = measure_coverage(model, [layers_by_name[c.name] for c in converted])
    replace_modules(model, new)
    return ConversionReport(tuple(converted), tuple(skipped), coverage)


def densify(model: nn.Module, layers: str | Sequence[str] | None = None) -> ConversionReport:
    """Replace structured layers by the dense ones that compute the same function, in place.

    The dense layer is a `torch.nn.Linear`, or of the class that was replaced: transformers' Conv1D or experts, or a
    subclass of `torch.nn.Linear` without a constructor of its own. Bias, device, dtype, mode, requires_grad and
    shared weights are kept; a weight is frozen if all its factors were.

    Args:
        model: any module that has structured layers inside.
        layers: a glob, or several, on qualified names: which structured layers to replace. None: all.

    Returns:
        A report on every layer, converted or skipped for a reason, such as hooks, which would be lost.

    Raises:
        ValueError: there is no structured layer inside the model, or none that could be replaced; a glob that matches
            no structured layer.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 64, "btt"))
        >>> report = el.densify(model)
        >>> report.params_before, report.params
        (1024, 4096)
    """
    every = layers_of(model, "layer.to_dense()", lambda m: isinstance(m, STRUCTURED_CLASSES))
    experts = {n: m for n, m in experts_modules(model).items() if isinstance(m, GatedExperts) and m.dense is not None}
    inside = {id(part) for module in experts.values() for part in module.modules()}
    mixtures = {n: m for n, m in plain_modules(model, True) if isinstance(m, Experts) and id(m) not in inside}
    matched = matching({**every, **experts, **mixtures}, layers, "layers", "structured layer")
    structured = {name: layer for name, layer in every.items() if name in matched}
    new, weights = dict[int, nn.Module](), dict[tuple[int, ...], nn.Parameter]()
    converted = list[Conversion]()
    skipped = [(n, "is a mixture of experts, which no dense layer computes") for n in mixtures if n in matched]
    # the factors of a quantised layer are no parameters, and nothing shares them
    factors = {name: tuple(map(id, layer.weight_parameters())) or (id(layer),) for name, layer in every.items()}
    hooked = {factors[name] for name, layer in every.items() if has_any_hooks(layer)}
    replaced = {id(layer) for layer in structured.values()}
    left = {factors[name]: name for name, layer in every.items() if id(layer) not in replaced}
    for name, layer in structured.items():
        if factors[name] in hooked:
            skipped.append((name, "it, or a layer that shares its factors, has hooks, which would be lost"))
        elif factors[name] in left:
            skipped.append((name, f"shares its factors with {left[factors[name]]}, which layers do not match"))
        elif id(layer) not in new:
            dense: Any = as_class(layer.to_dense(), layer.dense_class)
            dense.weight = weights.setdefault(factors[name], dense.weight)
            new[id(layer)] = dense
            s, entries = layer.structure, layer.in_features * layer.out_features
            costs = (0, 0) if isinstance(dense, nn.Embedding) else (s.macs, entries)
            converted.append(Conversion(name, s.spec, _describe(dense), s.params, entries, *costs))
    for name, module in experts.items():
        if name not in matched:
            continue
        if any(has_any_hooks(part) for part in module.modules()):
            skipped.append((name, "it has hooks, which would be lost"))
        elif id(module) not in new:
            new[id(module)] = module.to_dense()
            converted.append(densified_experts(name, module, new[id(module)]))
    if not converted:
        raise _nothing_converted(skipped, "there is no structured layer in the model")
    replace_modules(model, new)
    tables = {id(layer.weight) for layer in new.values() if isinstance(layer, nn.Embedding)}
    if any(id(layer.weight) in tables for layer in new.values() if isinstance(layer, nn.Linear)):
        # else a saved model would be loaded with a new head
        set_config_ties(model, True)
    return ConversionReport(tuple(converted), tuple(skipped))


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
    if experts is not None:
        if weights == "project":
            raise ValueError("experts have new weights: give weights='init', or leave experts out")
        check_experts(experts, 2 if active is None else active)


def _as_classes(value: type[nn.Module] | Sequence[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    classes = (value,) if isinstance(value, type) else value
    if isinstance(classes, list | tuple) and all(isinstance(c, type) and issubclass(c, nn.Linear) for c in classes):
        return tuple(classes)
    raise TypeError(f"classes must be a subclass of torch.nn.Linear, or a list of such, not {value!r}")


def _reasons_to_skip(
    model: nn.Module,
    linears: Mapping[str, Any],
    matched: Mapping[str, str],
    classes: tuple[type[nn.Module], ...],
    example_input: Batch | None,
) -> dict[str, str]:
    """Return why matched linear layers cannot be replaced, by name."""
    ineligible = {id(layer): reason_to_skip(layer, classes) for layer in linears.values()}
    uncalled = uncalled_layers(model, None if example_input is None else [example_input])
    owners = owners_of(model)

    def tied_elsewhere(layer: Any, spec: str) -> str | None:
        for name, other in owners[id(layer.weight)]:
            is_table = isinstance(other, nn.Embedding) or isinstance(layer, nn.Embedding)
            alike = name in linears and matched.get(name) == spec and (type(other) is type(layer) or is_table)
            if other is not layer and (not alike or ineligible[id(other)]):
                return f"its weight is tied to {name}, which is not converted to the same structure"
        return None

    reasons = {}
    for name in matched.keys() & linears:
        layer = linears[name]
        reasons[name] = ineligible[id(layer)] or tied_elsewhere(layer, matched[name]) or uncalled.get(id(layer))
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _new_experts(old: Any, structure: Any, weights: str, **config: Any) -> Any:
    if weights == "project":
        return GatedExperts.from_dense(old, structure)
    return GatedExperts.like(old, structure, **config)


@torch.no_grad()
def _new_layer(old: Any, s: Any, weights: str, **config: Any) -> Any:
    """Return the structured layer that replaces another one; `config` is that of a layer with new weights."""
    is_zero = _is_zero(old.weight)
    if weights == "project" and not is_zero:
        projected = structured_class(old).from_dense(old, s)
        projected.dense_class = type(old)
        return projected
    layer = structured_like(old, s, **config)
    if is_zero:
        layer.zero_last_factors()
        if layer.bias is not None:
            layer.bias.copy_(old.bias)
    return layer


@torch.no_grad()
def _conversion(name: str, old: Any, layer: Any, weights: str) -> Conversion:
    s, entries = layer.structure, layer.in_features * layer.out_features
    after, params, macs, error = s.spec, s.params, s.macs, None
    if isinstance(layer, MoELinear):
        after = f"{layer.experts} experts of {s.spec}, {layer.active} active"
        params, macs = layer.experts * s.params + layer.router.numel(), layer.layer_info().macs or 0
    elif weights == "project":
        weight = (weight_matrix(old) if is_linear(old) else old.weight.flatten(1)).float()
        difference = (layer.dense_weight().flatten(1).float() - weight).norm()
        error = float(difference / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
    # a lookup multiplies little
    macs_before, macs = (0, 0) if isinstance(layer, Embedding) else (entries, macs)
    return Conversion(name, _describe(old), after, entries, params, macs_before, macs, error, _is_zero(old.weight))


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return f"Embedding {module.num_embeddings} x {module.embedding_dim}"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return f"{type(module).__name__} {module.in_channels} -> {module.out_channels}"
    return "{} {} -> {}".format(type(module).__name__, *features(module))


def _is_zero(weight: Tensor) -> bool:
    # the first row is enough for most weights
    return not weight.is_meta and not weight[:1].any() and not weight.any()


def _nothing_converted(skipped: Sequence[tuple[str, str]], otherwise: str) -> ValueError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or otherwise
    return ValueError(f"no layer could be converted: {reasons}")
