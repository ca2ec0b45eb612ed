"""Which layers of a model are compressed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.linear_layers import fused_experts, linear_layers, owners_of
from einlinear.conversion.usage import uncalled_layers
from einlinear.nn.model_call import Batch
from einlinear.nn.names import as_globs, check_globs
from einlinear.nn.third_party import features, is_conv1d

_WATCHED = 2  # batches that tell which layers the model does not call
HEAD = "is the output head: name it in layers to compress it"
_HEADS = {"classifier", "fc", "head", "heads", "lm_head"}  # what torchvision, timm and transformers call them


def select(
    model: nn.Module, layers: str | Sequence[str] | None, batches: Sequence[Batch] | None = None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The dense linear layers that can be compressed, by name, and those that cannot, with the reason.

    Args:
        model: whose layers.
        layers: globs on qualified names; None: all but output heads, as far as names tell (see `compress`).
        batches: the calibration data.
    """
    linears, fused = linear_layers(model), fused_experts(model)
    globs = as_globs("*" if layers is None else layers, "layers")
    if not globs:
        raise ValueError("layers is empty: give a glob such as '*.mlp.*', or None for all but output heads")
    check_globs(globs if layers is not None else [], [*linears, *fused], "layers", "linear layer")
    heads = {id(layer) for layer in _heads(model, linears)} if layers is None else set()
    owners, uncalled = owners_of(model), uncalled_layers(model, None if batches is None else batches[:_WATCHED])
    chosen: dict[str, Any] = {}
    skipped = [(name, reason) for name, reason in fused.items() if any(fnmatchcase(name, glob) for glob in globs)]
    seen = set[int]()
    for name, layer in linears.items():
        if id(layer) in seen or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        seen.add(id(layer))
        reason = uncalled.get(id(layer)) or reason_to_skip(layer)
        if reason is None and len(owners[id(layer.weight)]) > 1:
            others = [other for other, module in owners[id(layer.weight)] if module is not layer]
            reason = f"has its weight tied to {', '.join(others)}"
        if reason is None and id(layer) in heads:
            reason = HEAD
        if reason is None and layer.weight.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model before you compress it")
        if reason is None:
            chosen[name] = layer
        else:
            skipped.append((name, reason))
    return chosen, skipped


def _heads(model: Any, linears: Mapping[str, Any]) -> list[Any]:
    """The layers that put out logits, of tokens or of labels, as far as the model's methods and names tell."""
    heads = [getattr(model, "get_output_embeddings", lambda: None)()]
    base, labels = getattr(model, "base_model", model), getattr(getattr(model, "config", None), "num_labels", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(module) for module in base.modules()}
        heads += [layer for layer in linears.values() if id(layer) not in inside and features(layer)[1] == labels]
    classifier = getattr(model, "get_classifier", lambda: None)()
    of_timm = classifier if isinstance(classifier, list | tuple) else [classifier]
    heads += [layer for part in of_timm if isinstance(part, nn.Module) for layer in part.modules()]
    if not linears:
        return heads
    *_, (last, layer) = linears.items()
    # "blocks.11.fc" is in a list of blocks, which have a layer of that name each
    before_lists = list(takewhile(lambda part: not part.isdigit(), last.split(".")))
    return [*heads, layer] if _HEADS.intersection(before_lists) else heads


def output_layers(
    model: nn.Module, layers: Mapping[str, Any], called: Sequence[str], last: Collection[str]
) -> set[str]:
    """Those of the layers that put out what the model does and are heads, as the calibration data show.

    A plain `nn.Sequential` has none, nor has a model that puts out as many features as its first layer reads, such as
    an autoencoder or a feed-forward block: nothing says that these put out logits.

    Args:
        model: whose layers.
        layers: by name.
        called: all that are called, in order.
        last: those whose outputs the model puts out.
    """
    if type(model) is nn.Sequential:
        return set()
    return {name for name in last if features(layers[name])[1] != features(layers[called[0]])[0]}


def weight_of(layer: Any) -> Tensor:
    """(out_features, in_features)."""
    weight: Tensor = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight
