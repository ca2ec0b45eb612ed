"""`fuse`: a tracer finds the feed-forward blocks of a model, and hooks on the modules around them mark them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.fusion.block_tracer import BlockTracer, TracedBlock
from einlinear.fusion.fusion_hooks import FUSION_HOOKS, BeginFusion, EndFusion, LayerNames
from einlinear.fusion.fusion_report import FusedBlock, FusionReport
from einlinear.nn import FeedForward, Linear, MoELinear
from einlinear.nn.dense_layers import features, is_linear
from einlinear.nn.interception import is_intercepted, is_plain_layer
from einlinear.nn.model_call import Batch, call
from einlinear.ops.context import is_unobserved


def fuse(model: nn.Module, batches: Iterable[Batch] | None = None) -> FusionReport:
    """Run the feed-forward blocks of a converted model fused, in place.

    A block is two structured layers with an activation between them, or three with a gate, in any model. On the CPU one
    tile of tokens after the other passes through all its layers, so hidden features are never in memory. Results are
    equal up to rounding, and modules, parameters and checkpoints stay as they are: only hooks are added, which copies
    and pickled models keep. Where something else needs the hidden features, such as dropout in training, hooks or
    autocast, the layers run one after the other, as they do under torch.compile and torch.export.

    Args:
        model: any module with structured layers (`convert`).
        batches: inputs on which the model is run to find its blocks, as `compress` takes them; a small one is enough.
            None: modules with layers that may be a block, such as MLPs, are run on a few random rows. Either happens in
            evaluation mode and without gradients.

    Returns:
        A report to print: all blocks, and layers that look like the first one of a block, with the reason why it does
        not run fused.

    Raises:
        TypeError: `batches` is a single batch, or one does not fit the forward pass.
        RuntimeError: the call is under autocast, torch.func or a dispatch mode.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        >>> report = el.convert(model, "btt")
        >>> [(block.up, block.down, block.activation) for block in el.fuse(model).blocks]
        [('0', '2', 'gelu')]
    """
    if batches is not None and (isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable)):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, not a {kind}: for a single batch give [batch]")
    if not is_unobserved():
        raise RuntimeError("fuse runs the model: call it outside of autocast, torch.func and dispatch modes")
    names = {module: name for name, module in model.named_modules()}
    modules = {m: name for m, name in names.items() if isinstance(m, FeedForward) and isinstance(m.activation, str)}
    ready = {layer for module in modules for layer in (module.up, module.gate, module.down)}
    candidates = [candidate for candidate in _candidates(model) if candidate.layer not in ready]
    tracer = BlockTracer(module for module in names if is_plain_layer(module) and module not in ready)
    failures: dict[tuple[nn.Module, int], str | None] = {}
    if batches is not None:
        for batch in batches:
            tracer.run(model, partial(call, model, batch))
    else:
        for candidate in candidates:
            if is_plain_layer(candidate.layer) and candidate.input not in failures:
                failures[candidate.input] = _run_on_rows(tracer, candidate.module, candidate.layer)
    blocks = tracer.blocks()
    unfuse(model)
    _add_hooks(blocks)
    in_blocks = {layer for block in blocks for layer in (block.up, block.gate, block.down)}
    skipped: dict[str, str] = {}
    for candidate in candidates:
        if candidate.looks_like_first and candidate.layer not in in_blocks:
            layer, place = candidate.layer, names[candidate.module] or "the model"
            reason = candidate.reason(names)
            if reason is None and tracer.was_called(layer):
                reason = tracer.reason(layer) or "the layer that it is multiplied with is used elsewhere as well"
            elif reason is None and batches is not None:
                reason = "is not called on these batches"
            elif reason is None:
                failure = failures[candidate.input] or "does not call it"
                reason = f"could not be tried: {place}, run on random rows, {failure}. Give batches"
            skipped.setdefault(names[layer], reason)
    described = tuple(_describe(block, names) for block in blocks)
    return FusionReport(described, tuple(skipped.items()), tuple(modules.values()))


def unfuse(model: nn.Module) -> None:
    """Run all layers of a model one after the other again: remove the hooks of `fuse`, in place.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), el.Linear(256, 64, "btt"))
        >>> report = el.fuse(model)
        >>> el.unfuse(model)
        >>> len(model._forward_hooks)
        0
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, FUSION_HOOKS)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class _Candidate(NamedTuple):
    """A layer that may be the first of a block, by its size: others inside of a module can read its output."""

    layer: Any
    # the innermost one with a forward pass of its own
    module: nn.Module
    readers: list[Any]
    # rather than a layer of attention or an output head: it has more outputs than inputs, and a reader comes after it
    looks_like_first: bool

    @property
    def input(self) -> tuple[nn.Module, int]:
        """The module, and the number of features that it may take."""
        return self.module, self.layer.in_features

    def reason(self, names: Mapping[nn.Module, str]) -> str | None:
        """Return why the layer cannot be the first of a block, whatever the model does with its output, or None."""
        if is_linear(self.layer):
            return "is dense: convert it first"
        if not isinstance(self.layer, Linear):
            return "is a mixture of experts"
        if not is_plain_layer(self.layer):
            return "has hooks or a forward pass of its own"
        if not any(isinstance(reader, Linear) for reader in self.readers):
            return f"{names[self.readers[0]]}, which reads its output, is dense: convert it first"
        return None


def _candidates(model: nn.Module) -> list[_Candidate]:
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in modules.items() if isinstance(m, Linear | MoELinear) or is_linear(m)}
    # by the name of a module, the layers inside by their input features
    inside: dict[str, dict[int, list[Any]]] = {}
    for name, layer in layers.items():
        for parent in _parents(name):
            inside.setdefault(parent, {}).setdefault(features(layer)[0], []).append(layer)

    order = [*layers.values()]

    def candidate(layer: Any, parents: Sequence[str], hidden_features: int) -> _Candidate | None:
        in_features, out_features = features(layer)
        for parent in parents:
            readers = [other for other in inside[parent].get(hidden_features, []) if other is not layer]
            if readers and type(modules[parent]).forward is not nn.Module.forward:
                comes_first = any(order.index(reader) > order.index(layer) for reader in readers)
                return _Candidate(layer, modules[parent], readers, out_features > in_features and comes_first)
        return None

    candidates: dict[tuple[Any, nn.Module], _Candidate] = {}
    for name, layer in layers.items():
        out_features = features(layer)[1]
        found = candidate(layer, _parents(name), out_features)
        # some models compute gate and up by one layer of twice the size
        found = found or candidate(layer, _parents(name), out_features // 2)
        if found is not None:
            candidates.setdefault((found.layer, found.module), found)
    return [*candidates.values()]


def _parents(name: str) -> list[str]:
    """Return the names of the modules around one, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)] if name else []


def _run_on_rows(tracer: BlockTracer, module: nn.Module, layer: Linear) -> str | None:
    """Run a module on random rows, with None for further arguments, and return what went wrong, or None."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    others = [None for parameter in parameters[1:] if parameter.default is inspect.Parameter.empty]
    kinds_of_parameters = {type(parameter) for parameter in layer.weight_parameters()} - {nn.Parameter}
    if kinds_of_parameters:
        # the first module that is run gathers the parameters of all others
        return f"has a {kinds_of_parameters.pop().__name__} for a parameter, as sharded layers have"
    like = layer.factors()[0]

    def run(*shape: int) -> Any:
        return module(torch.randn(*shape, layer.in_features, device="cpu").to(like), *others)

    failure = None
    for shape in ((2, 8), (16,)):
        try:
            tracer.run(module, partial(run, *shape))
            return None
        # a forward pass that was written for other inputs may raise anything
        except Exception as error:
            failure = failure or f"raised {type(error).__name__}: {error}"
    return failure


def _add_hooks(blocks: Sequence[TracedBlock]) -> None:
    by_module: dict[nn.Module, list[TracedBlock]] = {}
    for block in blocks:
        by_module.setdefault(block.module, []).append(block)
    for module, inside in by_module.items():
        names = {inner: name for name, inner in module.named_modules()}
        of_layers = [LayerNames(names[b.up], names[b.gate] if b.gate else None, names[b.down]) for b in inside]
        between = {names[inner] for block in inside for inner in block.between}
        module.register_forward_pre_hook(BeginFusion(tuple(of_layers), tuple(sorted(between))))
        # before others, which may free the factors
        module.register_forward_hook(EndFusion(), prepend=True, always_call=True)


def _describe(block: TracedBlock, names: Mapping[nn.Module, str]) -> FusedBlock:
    structures = [layer.structure for layer in (block.up, block.gate, block.down) if layer is not None]
    like = block.up.factors()[0]
    hooked = [
        f"{names[m]} has hooks or a forward pass of its own" for m in block.between if is_intercepted(m, FUSION_HOOKS)
    ]
    reasons = [
        hooked[0] if hooked else ops.reason_not_to_fuse(structures, 2048, like.dtype, like.device, training)
        for training in (False, True)
    ]
    gate = None if block.gate is None else names[block.gate]
    return FusedBlock(names[block.module], names[block.up], gate, names[block.down], block.activation, *reasons)
