"""`adapt`: trainable structured matrices beside the frozen linear layers of any model."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from einlinear.adapters.active_adapters import activate
from einlinear.adapters.adaptation_report import Adaptation, AdaptationReport, count_parameters
from einlinear.adapters.adapted_linear import AdaptedLinear, Adapter
from einlinear.conversion.experts import unsupported_experts
from einlinear.conversion.replacement import is_any_linear, replace_modules
from einlinear.conversion.structure_plan import match_structures
from einlinear.conversion.weight_usage import uncalled_layers
from einlinear.nn import MoELinear
from einlinear.nn.dense_layers import features
from einlinear.nn.model_call import Batch
from einlinear.nn.names import plain_modules
from einlinear.structures import DoesNotFit
from einlinear.structures import structure as make_structure


def adapt(
    model: nn.Module,
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    name: str = "default",
    dtype: torch.dtype | None = None,
    example_input: Batch | None = None,
) -> AdaptationReport:
    """Put a trainable structured matrix S beside linear layers, in place: y = W x + bias + scale * S dropout(x).

    S starts at zero, so the model computes the same at first. `torch.nn.Linear` and its subclasses, transformers'
    Conv1D, and structured layers, quantised or not, become an `AdaptedLinear`. The first call freezes all parameters of
    the model; a head that is to be trained can be unfrozen after it. LoRA is the structure "low_rank(rank=r)".

    Args:
        model: any module that has linear layers inside.
        structure: of S in all matched layers; or glob on qualified names -> structure, where the first match counts.
            Globs and names are those of `einlinear.convert`.
        layers: a glob, or several, on qualified names: which linear layers to adapt. None: all.
        exclude: a glob, or several: which of these to leave out.
        scale: what S x is multiplied by. LoRA's is alpha / r.
        dropout: the probability that an input of S is zero in training.
        name: of the adapter. A model can have several; the one that was added last is active, see `activate`.
        dtype: of the factors. None: that of the layer, or the default dtype where a layer stores integers.
        example_input: as for `einlinear.convert`, to see which layers the model calls.

    Returns:
        A report to print: every matched layer, adapted or skipped for a reason, and the share of trainable parameters.

    Raises:
        ValueError: an unknown structure, a glob that matches no linear layer, a scale, dropout or name that is not
            allowed, or no layer that could be adapted. The model is then unchanged.
        TypeError: a structure that is not text, a scale or dropout that is no number.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> print(el.adapt(model, "monarch(blocks=4)", layers="0"))
        layer  base             adapter 'default'  params  of the matrix
        0      Linear 64 -> 64  monarch            2,048   50.00%
        Trainable: 2,048 of 6,728 parameters (30.44%).
    """
    # 1. check the arguments
    check_numbers(scale, dropout)
    check_name(name)
    linears, fused = adaptable_layers(model), unsupported_experts(model, "gets no adapter")
    matched = match_structures([*linears, *fused], structure, layers, exclude)

    # 2. make the adapters
    uncalled = uncalled_layers(model, None if example_input is None else [example_input])
    adapters, skipped, seen = dict[str, Adapter](), list[tuple[str, str]](), set[int]()
    for key, spec in matched.items():
        layer: Any = linears.get(key)
        if reason := fused.get(key) or reason_not_to_adapt(layer, name) or uncalled.get(id(layer)):
            skipped.append((key, reason))
        elif id(layer) not in seen:
            try:
                s = make_structure(spec, *features(layer))
            except DoesNotFit as error:
                skipped.append((key, str(error)))
                continue
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            seen.add(id(layer))
            kind = layer.weight.dtype if layer.weight.is_floating_point() else None
            device, wanted = layer.weight.device, kind if dtype is None else dtype
            adapters[key] = Adapter(*features(layer), s, scale, dropout, device=device, dtype=wanted)
    if not adapters:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in skipped)
        raise ValueError(f"no layer could be adapted: {reasons or 'none matches layers and structure'}")

    # 3. put them beside the layers
    return attach(model, name, adapters, skipped)


def attach(
    model: nn.Module, name: str, adapters: Mapping[str, Adapter], skipped: Sequence[tuple[str, str]] = ()
) -> AdaptationReport:
    """Put adapters beside layers, by the name of the layer, and make them the active ones; checks nothing."""
    layers = adaptable_layers(model)
    if not any(isinstance(layer, AdaptedLinear) for layer in layers.values()):
        model.requires_grad_(False)
    wrappers, adapted = dict[int, nn.Module](), list[Adaptation]()
    for key, adapter in adapters.items():
        layer = layers[key]
        wrapper = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer)
        wrapper.adapters[name] = adapter.train(layer.training)
        wrappers[id(layer)] = wrapper
        s = adapter.structure
        base = "{} {} -> {}".format(type(wrapper.base_layer).__name__, *features(layer))
        adapted.append(Adaptation(key, base, s.spec, s.params, s.params / (s.in_features * s.out_features)))
    replace_modules(model, wrappers)
    activate(model, name)
    return AdaptationReport(name, tuple(adapted), tuple(skipped), *count_parameters(model))


def adaptable_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers, adapted ones once, by every qualified name they have, without prefixes of wrappers."""
    layers: dict[str, Any] = {}
    for name, module in plain_modules(model):
        parts = name.split(".")
        above = (layers.get(".".join(parts[:i])) for i in range(len(parts)))
        is_layer = isinstance(module, AdaptedLinear) or is_any_linear(module)
        if is_layer and not any(isinstance(layer, AdaptedLinear) for layer in above):
            layers[name] = module
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise ValueError(f"{lazy[0]} has no values yet: call the model once, so that its features are known")
    if "" in layers:
        raise ValueError("the model is itself a linear layer, which cannot be replaced in place: use nn.Sequential")
    return layers


def reason_not_to_adapt(layer: Any, name: str) -> str | None:
    """Return why a layer cannot get an adapter of this name, or None."""
    if isinstance(layer, MoELinear):
        return f"is a mixture of experts: {layer.structure.spec}"
    # of DTensors, which take long to import
    if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters()):
        return "has a sharded weight: call el.adapt before fully_shard"
    if isinstance(layer, AdaptedLinear):
        if layer.merged:
            return f"has adapters that are merged ({', '.join(layer.merged)}): call el.adapters.unmerge(model) first"
        if name in layer.adapters:
            return f"has an adapter named {name!r} already: give another name, or call el.adapters.remove first"
    return None


def check_numbers(scale: Any, dropout: Any) -> None:
    """Raise TypeError or ValueError for a scale or dropout that an adapter cannot have."""
    for argument, value in (("scale", scale), ("dropout", dropout)):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{argument} must be a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{argument} must be finite, not {value!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to less than 1, not {dropout!r}")


def check_name(name: Any) -> None:
    """Raise TypeError or ValueError for a name that an adapter cannot have: it is a part of qualified names."""
    if not isinstance(name, str):
        raise TypeError(f"name must be text, not {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be a word without dots, and no attribute of nn.ModuleDict, not {name!r}")
