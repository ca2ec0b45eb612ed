"""Selection of the layers to compress, by their names and by how the model uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from einlinear.compression.activations import hooked, output_of
from einlinear.compression.embedding_tables import Owners, tied_head
from einlinear.compression.expert_stacks import NOT_OPENED, DenseStack, stacks_of
from einlinear.conversion.conversion_report import Coverage, measure_coverage
from einlinear.conversion.eligibility import reason_to_skip
from einlinear.conversion.experts import reason_to_skip_experts, unsupported_experts
from einlinear.conversion.replacement import linear_layers, modules_of, owners_of
from einlinear.conversion.weight_usage import uncalled_layers
from einlinear.nn import Embedding
from einlinear.nn.dense_layers import features
from einlinear.nn.model_call import Batch, call, frozen
from einlinear.nn.names import as_globs, full_names, matching

# names of output heads in torchvision, timm and transformers
_HEAD_NAMES = {"classifier", "fc", "head", "heads", "lm_head"}
_IS_HEAD = "is the output head: name it in layers to compress it"
_UNREACHED = "gets no gradient from the model's output (of several, only the logits or the first one counts)"
# nodes of autograd's graph that may follow an output head: views, copies, and functions of logits
_AFTER_HEAD = {
    *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze"),
    *("Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    *("LogSoftmax", "Sigmoid", "Softmax"),
}


@dataclass(frozen=True)
class Stage:
    """Layers that read the same input, such as queries, keys and values; each is called `calls` times in a pass."""

    names: tuple[str, ...]
    calls: int


@dataclass(frozen=True)
class Selection:
    """The dense layers to compress by name and in stages, in the order of their calls; the others with reasons.

    Layers have the names that `get_submodule` takes; `names` has those without prefixes of wrappers, by these, and
    `tied_heads` the output heads that share the weights of embeddings, by these.
    """

    layers: dict[str, Any]
    stages: list[Stage]
    skipped: list[tuple[str, str]]
    coverage: Coverage
    names: dict[str, str]
    tied_heads: dict[str, str]

    def linear(self) -> Selection:
        """Return the linear layers alone, without embeddings and stacks of experts."""
        layers = {n: layer for n, layer in self.layers.items() if not isinstance(layer, DenseStack | nn.Embedding)}
        stages = [replace(stage, names=tuple(n for n in stage.names if n in layers)) for stage in self.stages]
        return replace(self, layers=layers, stages=[stage for stage in stages if stage.names])


def select_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None,
    batches: Sequence[Batch] | None = None,
    embeddings: str | Sequence[str] = (),
) -> Selection:
    """Select linear layers by globs, or all but output heads, and embeddings by globs.

    Batches show their order, and which the output depends on.
    """
    only_embeddings = bool(embeddings) and layers is not None and not as_globs(layers, "layers")
    chosen, skipped = ({}, []) if only_embeddings else _suitable_layers(model, layers, batches)
    tables, tied_heads, others = _suitable_tables(model, embeddings)
    chosen, skipped = chosen | tables, [part for part in skipped if part[0] not in tied_heads.values()] + others
    stages = [Stage((name,), 1) for name in chosen]
    reasons: dict[str, str] = {}
    if batches is not None:
        with frozen(model.parameters()):
            trace = _trace(model, chosen, batches)
        stages, called = trace.stages, trace.called
        reasons = {name: "is never called on the calibration data" for name in chosen if name not in called}
        reasons |= {name: _UNREACHED for name in called if name not in trace.reached}
        if layers is None and type(model) is not nn.Sequential:
            heads = _heads_by_trace({name: chosen[name] for name in called if name not in tables}, trace.last)
            reasons |= {name: _IS_HEAD for name in heads if name not in reasons}
    full = full_names(model)
    names = {name: short for short, name in full.items()}
    skipped += [(names[name], reason) for name, reason in reasons.items()]
    selectable = [Stage(tuple(n for n in stage.names if n not in reasons), stage.calls) for stage in stages]
    stages = [stage for stage in selectable if stage.names]
    selected = {name: chosen[name] for stage in stages for name in stage.names}
    coverage = measure_coverage(model, selected.values())
    if not selected:
        because = [f"{name} {reason}" for name, reason in skipped] or ["the model has no linear layer"]
        because += [f"not considered: {', '.join(map(str, coverage.others))}"] if coverage.others else []
        raise ValueError(f"there is no dense linear layer to compress: {'; '.join(because)}")
    if broken := next((name for name, layer in selected.items() if not layer.weight.isfinite().all()), None):
        raise ValueError(f"the weight of {names[broken]} has values that are NaN or infinite")
    tied_heads = {table: full[head] for table, head in tied_heads.items() if table in selected}
    return Selection(selected, stages, skipped, coverage, names, tied_heads)


def _suitable_layers(
    model: nn.Module, layers: str | Sequence[str] | None, batches: Sequence[Batch] | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the layers that a structured one can replace, by name, and those that none can, with the reason."""
    linears, stacks, full = linear_layers(model), stacks_of(model), full_names(model)
    fused = unsupported_experts(model, NOT_OPENED)
    fused |= {n: reason for n in fused if (reason := reason_to_skip_experts(model.get_submodule(full[n])))}
    if layers is not None and not as_globs(layers, "layers"):
        raise ValueError("layers is empty: give a glob such as '*.mlp.*', None for all but output heads, or embeddings")
    experts = {stack: stack.rpartition(".")[0] for stack in stacks}
    names = dict.fromkeys([*linears, *fused, *stacks, *experts.values()])
    matched = matching(names, layers, "layers", "linear layer")
    heads = {id(layer) for layer in _heads_by_name(model, linears)} if layers is None else set()
    # two batches show which layers the model calls
    owners, uncalled = owners_of(model), uncalled_layers(model, None if batches is None else batches[:2])
    chosen: dict[str, Any] = {}
    skipped = [(name, reason) for name, reason in fused.items() if name in matched]
    seen = set[int]()
    for name, layer in linears.items():
        if id(layer) in seen or name not in matched:
            continue
        seen.add(id(layer))
        reason = uncalled.get(id(layer)) or reason_to_skip(layer) or _reason_of_ties(layer, owners)
        if reason or id(layer) in heads:
            skipped.append((name, reason or _IS_HEAD))
        else:
            _check_is_loaded(name, layer)
            chosen[full[name]] = layer
    for name, stack in stacks.items():
        if name in matched or experts[name] in matched:
            _check_is_loaded(name, stack)
            chosen[full[name]] = stack
    return chosen, skipped


def _suitable_tables(
    model: nn.Module, embeddings: str | Sequence[str]
) -> tuple[dict[str, Any], dict[str, str], list[tuple[str, str]]]:
    """Return the tables of embeddings that globs match and the heads tied to them, by name, and the others' reasons."""
    full, owners = full_names(model), owners_of(model)
    matched = matching(modules_of(model, nn.Embedding | Embedding), embeddings, "embeddings", "embedding")
    chosen, tied_heads, skipped = dict[str, Any](), dict[str, str](), list[tuple[str, str]]()
    for name, table in matched.items():
        head = tied_head(table, owners)
        reason = _reason_of_ties(table, owners) if head is None else reason_to_skip(head[1])
        if (reason := reason_to_skip(table) or reason) is not None:
            skipped.append((name, reason))
        elif not any(table is other for other in chosen.values()):
            _check_is_loaded(name, table)
            chosen[full[name]] = table
            tied_heads |= {full[name]: head[0]} if head is not None else {}
    return chosen, tied_heads, skipped


def _reason_of_ties(layer: Any, owners: Owners) -> str | None:
    others = [name for name, module in owners[id(layer.weight)] if module is not layer]
    return f"has its weight tied to {', '.join(others)}" if others else None


def _check_is_loaded(name: str, layer: Any) -> None:
    if layer.weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model before you compress it")


def _heads_by_name(model: Any, linears: Mapping[str, Any]) -> list[Any]:
    """Return the layers that compute logits, of tokens or of labels, as far as the model's methods and names tell."""
    heads = [getattr(model, "get_output_embeddings", lambda: None)()]
    base, labels = getattr(model, "base_model", model), getattr(getattr(model, "config", None), "num_labels", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(module) for module in base.modules()}
        heads += [layer for layer in linears.values() if id(layer) not in inside and features(layer)[1] == labels]
    classifier = getattr(model, "get_classifier", lambda: None)()
    of_timm = classifier if isinstance(classifier, list | tuple) else [classifier]
    heads += [layer for part in of_timm if isinstance(part, nn.Module) for layer in part.modules()]
    last = [*linears][-1] if linears else ""
    # "blocks.11.fc" is in a list of blocks, which have a layer of that name each
    before_lists = takewhile(lambda part: not part.isdigit(), last.split("."))
    return [*heads, linears[last]] if _HEAD_NAMES.intersection(before_lists) else heads


def _heads_by_trace(called: Mapping[str, Any], last: set[str]) -> list[str]:
    """Return the layers, of those that are called in order, whose outputs are the model's and may be logits."""
    # as many outputs as the first layer has inputs: an autoencoder or a feed-forward block
    sizes = [(name, *features(layer)) for name, layer in called.items()]
    return [name for name, _, out_features in sizes if name in last and out_features != sizes[0][1]]


@dataclass(frozen=True)
class _Trace:
    """Stages in the order of their calls, layers that get tokens, those with gradients, and those of the output."""

    stages: list[Stage]
    called: list[str]
    reached: set[str]
    last: set[str]


def _trace(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]) -> _Trace:
    inputs: dict[str, list[tuple[int, int]]] = {}
    calls, reached, last = dict.fromkeys(layers, 0), set[str](), set[str]()
    numbers, new_number = WeakTensorKeyDictionary(), count()
    # layers by the graph's node of their output
    nodes: dict[Any, str] = {}

    def record(name: str, x: Tensor, output: Tensor) -> Tensor:
        if name not in staged:
            # the version changes with every operation in place
            version = 0 if x.is_inference() else x._version
            inputs.setdefault(name, []).append((numbers.setdefault(x, next(new_number)), version))
        if not output.numel():
            return output
        calls[name] += 1
        output.requires_grad_().register_hook(lambda _: reached.add(name))
        # a clone: an operation in place would change the node
        result = output.clone()
        nodes[result.grad_fn] = name
        return result

    for batch in batches:
        # after two calls without a gradient the output counts as independent of a layer
        left = {name: layer for name, layer in layers.items() if name not in reached and calls[name] < 2}
        if not left:
            break
        staged = set(inputs)
        with torch.enable_grad(), saved_tensors_hooks(_forget, _zeros), hooked(left, record):
            output = output_of(call(model, batch))
            if output.requires_grad:
                last |= _sources(output.grad_fn, nodes)
                # of many logits only the sum is kept: their gradient takes as much memory as they do
                total = output.sum(dtype=torch.float32)
                del output
                total.backward()
        nodes.clear()
    stages: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, identities in inputs.items():
        stages.setdefault(tuple(identities), []).append(name)
    in_order = [Stage(tuple(names), len(identities)) for identities, names in stages.items()]
    return _Trace(in_order, [name for stage in in_order for name in stage.names if calls[name]], reached, last)


def _forget(saved: Tensor) -> Any:
    """Keep a tensor's shape alone for the backward pass: its values do not decide which layers gradients reach."""
    is_dense = saved.is_floating_point() and saved.layout is torch.strided
    return (saved.shape, saved.dtype, saved.device) if is_dense else saved


def _zeros(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else torch.zeros(kept[0], dtype=kept[1], device=kept[2])


def _sources(node: Any, nodes: Mapping[Any, str]) -> set[str]:
    """Return the layers whose outputs a tensor consists of, by its node in the graph."""
    if node in nodes:
        return {nodes[node]}
    if node is None or node.name().rstrip("0123456789").removesuffix("Backward") not in _AFTER_HEAD:
        return set()
    return {source for function, _ in node.next_functions for source in _sources(function, nodes)}
