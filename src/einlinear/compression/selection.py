"""Selection of the layers to compress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from einlinear.compression.activations import Stage, stages_of
from einlinear.compression.tracing import trace_layers
from einlinear.conversion.coverage import Coverage, measure_coverage
from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.replacement import fused_experts, linear_layers, owners_of
from einlinear.conversion.usage import uncalled_layers
from einlinear.nn.layer_kinds import features, is_conv1d
from einlinear.nn.model_call import Batch
from einlinear.nn.names import as_globs, check_globs

# batches that show which layers the model does not call
_WATCHED = 2
# names of output heads in torchvision, timm and transformers
_HEADS = {"classifier", "fc", "head", "heads", "lm_head"}
_IS_HEAD = "is the output head: name it in layers to compress it"
_NOT_CALLED = "is never called on the calibration data"
_UNREACHED = "gets no gradient from the model's output (of several, only the logits or the first one counts)"


@dataclass(frozen=True)
class Selection:
    """The layers of a model to compress.

    Attributes:
        layers: dense linear layers by name, in the order of their calls.
        stages: these layers, those with the same input together.
        skipped: the other linear layers, as (name, reason).
        coverage: the share of the model's parameters that the layers hold.
    """

    layers: dict[str, Any]
    stages: list[Stage]
    skipped: list[tuple[str, str]]
    coverage: Coverage


def select_layers(
    model: nn.Module, layers: str | Sequence[str] | None, batches: Sequence[Batch] | None = None
) -> Selection:
    """Select the dense linear layers to compress, by their names and by how the model uses them.

    Args:
        model: whose layers.
        layers: globs on qualified names; None: all but output heads (see `compress`).
        batches: the calibration data, which show the order of the layers and which of them the output depends on.

    Raises:
        ValueError: there is no layer to compress, or the weight of one is on the meta device, NaN or infinite.
    """
    chosen, skipped = _suitable_layers(model, layers, batches)
    reasons: dict[str, str] = {}
    if batches is None:
        stages = [Stage((name,), 1) for name in chosen]
    else:
        stages = stages_of(model, chosen, batches)
        trace = trace_layers(model, chosen, batches)
        called = [name for stage in stages for name in stage.names if name in trace.called]
        reasons = {name: _NOT_CALLED for name in chosen if name not in called}
        reasons |= {name: _UNREACHED for name in called if name not in trace.reached}
        if layers is None and type(model) is not nn.Sequential:
            # as many outputs as the first layer has inputs: an autoencoder or a feed-forward block, not logits
            last = [name for name in called if name in trace.last and name not in reasons]
            reasons |= {n: _IS_HEAD for n in last if features(chosen[n])[1] != features(chosen[called[0]])[0]}
    skipped += reasons.items()
    stages = [Stage(tuple(n for n in stage.names if n not in reasons), stage.calls) for stage in stages]
    stages = [stage for stage in stages if stage.names]
    selected = {name: chosen[name] for stage in stages for name in stage.names}
    coverage = measure_coverage(model, selected.values())
    if not selected:
        because = [f"{name} {reason}" for name, reason in skipped] or ["the model has no linear layer"]
        others = [f"not considered: {', '.join(map(str, coverage.others))}"] if coverage.others else []
        raise ValueError(f"there is no dense linear layer to compress: {'; '.join([*because, *others])}")
    if broken := next((name for name, layer in selected.items() if not weight_of(layer).isfinite().all()), None):
        raise ValueError(f"the weight of {broken} has values that are NaN or infinite")
    return Selection(selected, stages, skipped, coverage)


def _suitable_layers(
    model: nn.Module, layers: str | Sequence[str] | None, batches: Sequence[Batch] | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The layers that a structured one can replace, by name, and those that none can, with the reason."""
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
            reason = _IS_HEAD
        if reason is None and layer.weight.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model before you compress it")
        if reason is None:
            chosen[name] = layer
        else:
            skipped.append((name, reason))
    return chosen, skipped


def _heads(model: Any, linears: Mapping[str, Any]) -> list[Any]:
    """The layers that compute logits, of tokens or of labels, as far as the model's methods and names tell."""
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


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a dense linear layer as (out_features, in_features)."""
    weight: Tensor = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight
