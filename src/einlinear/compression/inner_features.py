"""Inner features of blocks: hidden features of feed-forward blocks and heads of attention, found by running the model.

Producers write the inner features, and a consumer alone reads them, in groups that do not depend on each other: single
features, or heads that share keys and values. No module is recognised by name. Groups are removed from a copy, and its
consumer has to read the others unchanged, and nothing else in the model may change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.compression.activations import hooked, output_of
from einlinear.compression.calibration import spread_numbers
from einlinear.compression.selection import Selection, Stage
from einlinear.conversion.replacement import replace_modules
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.nn.model_call import Batch, call
from einlinear.nn.narrowed import copy_into, joined, resized, set_attributes


@dataclass(frozen=True)
class InnerFeatures:
    """Groups of features between layers of one block.

    Attributes:
        owner: the innermost module with all the layers.
        producers: the sizes of the parts of a producer's outputs by name, such as queries, keys and values of one
            layer; each part is divided into the groups.
        consumer: the layer that reads the features.
        size, groups: the number of the consumer's inputs, and of the groups that they are divided into.
        attributes: of modules, with the values for all groups, in proportion to which those for fewer are.
        removable: whether the model also runs without any.
        allowed: the numbers of groups that may be kept; None for all.
    """

    owner: str
    producers: dict[str, tuple[int, ...]]
    consumer: str
    size: int
    groups: int
    attributes: dict[str, dict[str, int]]
    removable: bool = False
    allowed: frozenset[int] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.producers, self.consumer)

    @property
    def shape(self) -> tuple[object, ...]:
        """The sizes that blocks of one kind have in common."""
        return self.size, self.groups, tuple(self.producers.values())

    def outputs(self, producer: str, kept: Sequence[int]) -> list[int]:
        """Return the outputs of a producer that belong to groups."""
        parts, start = [], 0
        for size in self.producers[producer]:
            parts += [start + i for i in _members(size, self.groups, kept)]
            start += size
        return parts

    def inputs(self, kept: Sequence[int]) -> list[int]:
        """Return the inputs of the consumer that belong to groups."""
        return _members(self.size, self.groups, kept)

    def attributes_for(self, groups: int) -> dict[str, dict[str, int]]:
        """Return the attributes of modules, by name, for a number of groups."""
        return {
            name: {key: value * groups // self.groups for key, value in values.items()}
            for name, values in self.attributes.items()
        }


def _members(size: int, groups: int, kept: Sequence[int]) -> list[int]:
    each = size // groups
    return [group * each + i for group in kept for i in range(each)]


@torch.no_grad()
def find_inner_features(model: nn.Module, selection: Selection, batches: Sequence[Batch]) -> list[InnerFeatures]:
    """Return all inner features, no two of which share a layer. The model has to be in evaluation mode."""
    batch = min(batches, key=_size)
    found: list[InnerFeatures] = []
    used = set[str]()
    for number, stage in enumerate(selection.stages):
        for consumer in stage.names:
            stages = [_unused(before, used) for before in selection.stages[:number]]
            if not (producers := _nearest(stages, consumer)) or consumer in used:
                continue
            check = _Check(model, consumer, batch)
            for proposal in _proposals(model, selection, producers, consumer):
                if check.passes(proposal, spread_numbers(proposal.groups)[1 : 1 + max(1, proposal.groups // 4)]):
                    removable = check.passes(proposal, ())
                    found.append(replace(proposal, removable=removable))
                    used |= {*proposal.layers}
                    break
    return found


def _size(batch: Batch) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def _unused(stage: Stage, used: set[str]) -> tuple[str, ...]:
    return tuple(name for name in stage.names if name not in used) if stage.calls == 1 else ()


def _nearest(stages: Sequence[tuple[str, ...]], consumer: str) -> tuple[str, ...]:
    """Return the layers that share the innermost module with a consumer, of the last stage that has such layers."""
    nearest, depth = tuple[str, ...](), 0
    for names in stages:
        depths = {name: len(_owner([name, consumer]).split(".")) if "." in name else 0 for name in names}
        deepest = max(depths.values(), default=-1)
        if deepest >= depth:
            nearest, depth = tuple(name for name in names if depths[name] == deepest), deepest
    return nearest


def _owner(names: Sequence[str]) -> str:
    """Return the name of the innermost module with all these layers."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def _proposals(
    model: nn.Module, selection: Selection, producers: Sequence[str], consumer: str
) -> Iterator[InnerFeatures]:
    """Yield divisions of the features into groups, the finest first, with the attributes that may go with them."""
    size = features(selection.layers[consumer])[0]
    owner = _owner([*producers, consumer])
    around = _modules_around(model, owner, [*producers, consumer])
    heads = {value for module in around.values() for key, value in _integers(module) if "head" in key and value > 0}
    for parts in _parts(size, {name: features(selection.layers[name])[1] for name in producers}):
        widths = {size, *(part for of_layer in parts.values() for part in of_layer)}
        # numbers of heads, or of features of a head
        counts = {size, *heads, *(min(widths) // value for value in heads)} - {0}
        for groups in sorted(counts, reverse=True):
            if not any(width % groups for width in widths):
                hidden = features(selection.layers[consumer])[1]
                plain = _attributes(around, groups, widths, {hidden})
                yield InnerFeatures(owner, parts, consumer, size, groups, plain)
                if (every := _attributes(around, groups, widths, set())) != plain:
                    yield InnerFeatures(owner, parts, consumer, size, groups, every)


def _parts(size: int, outputs: Mapping[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the parts of each producer's outputs: one, several of the consumer's size, or queries, keys and values."""
    yield {name: (out,) for name, out in outputs.items()}
    if len(outputs) == 1:
        ((name, out),) = outputs.items()
        if out > size and out % size == 0:
            yield {name: (size,) * (out // size)}
        elif out > size and (out - size) % 2 == 0:
            yield {name: (size, (out - size) // 2, (out - size) // 2)}


def _modules_around(model: nn.Module, owner: str, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules from an owner down to its layers, without these."""
    names = {owner}
    for layer in layers:
        inside = layer.removeprefix(owner).strip(".").split(".")
        names |= {joined(owner, ".".join(inside[:depth])) for depth in range(1, len(inside))}
    return {name: model.get_submodule(name) for name in sorted(names)}


def _integers(module: nn.Module) -> list[tuple[str, int]]:
    return [(key, value) for key, value in vars(module).items() if type(value) is int]


def _attributes(
    modules: Mapping[str, nn.Module], groups: int, widths: set[int], ambiguous: set[int]
) -> dict[str, dict[str, int]]:
    """Return numbers of heads and widths that change with the groups; an ambiguous width may be that of other features.

    The size of a head does not change.
    """
    result: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        for key, value in _integers(module):
            is_count = is_head_count(key) and value % groups == 0
            is_width = value in widths and (value not in ambiguous or key.startswith("all_head"))
            if value > 0 and (is_count or is_width):
                result.setdefault(name, {})[key] = value
    return result


def is_head_count(key: str) -> bool:
    """Return whether an attribute is called like a number of heads, and not like the size of one."""
    return "head" in key and "dim" not in key and "size" not in key


class _Check:
    """A model's run on a batch, against runs without some of the features that one layer reads."""

    def __init__(self, model: nn.Module, consumer: str, batch: Batch) -> None:
        self._model, self._consumer, self._batch = model, consumer, batch
        self._calls: list[tuple[Tensor, Tensor]] = []

        def record(_: str, x: Tensor, output: Tensor) -> None:
            self._calls.append((x.clone(), output.clone()))

        with hooked({"": model.get_submodule(consumer)}, record):
            self._output = output_of(call(model, batch)).clone()

    def passes(self, inner: InnerFeatures, kept: Sequence[int]) -> bool:
        """Return whether the consumer reads the kept features unchanged, and nothing else reads the removed ones."""
        if len(self._calls) != 1:
            return False
        ((x, y),) = self._calls
        seen: list[Tensor] = []

        # the rest of the model gets the outputs of the original
        def restore(_: str, x: Tensor, output: Tensor) -> Tensor:
            seen.append(x.clone())
            return y.clone() if output.shape == y.shape else output

        changed = without_groups(self._model, [(inner, kept)])
        try:
            with hooked({"": changed.get_submodule(self._consumer)}, restore):
                output = output_of(call(changed, self._batch))
        # sizes that do not fit each other raise anything
        except Exception:
            return False
        return len(seen) == 1 and _is_close(seen[0], x[..., inner.inputs(kept)]) and _is_close(output, self._output)


def _is_close(x: Tensor, expected: Tensor) -> bool:
    if x.shape != expected.shape or not x.isfinite().all():
        return False
    difference = (x.float() - expected.float()).norm()
    return bool(difference <= (1e-4 if x.dtype == torch.float32 else 2e-2) * expected.float().norm())


@torch.no_grad()
def without_groups(model: nn.Module, blocks: Sequence[tuple[InnerFeatures, Sequence[int]]]) -> nn.Module:
    """Return a copy, which shares the other tensors, whose blocks keep only these groups of their inner features."""
    changed = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for inner, kept in blocks:
        new: dict[int, nn.Module] = {}
        for name in inner.layers:
            old: Any = changed.get_submodule(name)
            weight, bias = weight_matrix(old), old.bias
            if name == inner.consumer:
                weight = weight[:, inner.inputs(kept)]
            else:
                rows = inner.outputs(name, kept)
                weight, bias = weight[rows], None if bias is None else bias[rows]
            layer = resized(old, weight.shape[1], len(weight))
            copy_into(layer, weight)
            if bias is not None:
                layer.bias.copy_(bias)
            new[id(old)] = layer
        replace_modules(changed, new)
        set_attributes(changed, inner.attributes_for(len(kept)))
    return changed
