"""Sizes of narrowed blocks in the config of a transformers model, with which transformers alone loads the model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.inner_features import InnerFeatures, find_inner_features, is_head_count, without_groups
from einlinear.compression.narrowing import NARROW, UNIFORM, NarrowCandidate
from einlinear.compression.selection import Selection
from einlinear.nn.model_call import Batch
from einlinear.nn.narrowed import mark_narrowed, set_attributes

_NO_BLOCK = "in no block of which hidden features or heads can be removed"
_NO_SIZE = "in a block of a size that the config cannot change; narrow without uniform=True changes it"
# blocks, each with the groups that it keeps
Blocks = Sequence[tuple[InnerFeatures, Sequence[int]]]


def find_blocks(
    model: nn.Module, selection: Selection, batches: Sequence[Batch], families: Sequence[str]
) -> tuple[list[InnerFeatures], list[tuple[str, str]]]:
    """Return the blocks that can be narrowed, if families ask for it, and the other layers with reasons."""
    if not {NARROW, UNIFORM} & {*families}:
        return [], []
    if not batches:
        raise ValueError(f"{NARROW} needs calibration data: blocks that can be narrowed are found by running the model")
    found = find_inner_features(model, selection, batches)
    reasons = dict[str, str]()
    if UNIFORM in families and _has_config(model):
        by_shape: dict[object, list[InnerFeatures]] = {}
        for inner in found:
            by_shape.setdefault(inner.shape, []).append(inner)
        allowed = {shape: _sizes_in_config(model, kind) for shape, kind in by_shape.items()}
        reasons = {name: _NO_SIZE for inner in found if not allowed[inner.shape] for name in inner.layers}
        found = [replace(inner, allowed=allowed[inner.shape]) for inner in found if allowed[inner.shape]]
    narrow = {name for inner in found for name in inner.layers}
    others = [(name, reasons.get(name, _NO_BLOCK)) for name in selection.layers if name not in narrow]
    if not found and {*families} <= {NARROW, UNIFORM}:
        because = "; ".join(f"{name} {reason}" for name, reason in others)
        raise ValueError(f"no block can be narrowed: {because}. Name another structure as well")
    return found, others


def _sizes_in_config(model: nn.Module, kind: Sequence[InnerFeatures]) -> frozenset[int]:
    """Return the numbers of groups of all blocks of a kind that the config can say."""
    groups = kind[0].groups
    if groups == kind[0].size:
        # one stands for all: no config asks for certain widths
        is_possible = config_changes(model, [(inner, range((groups + 1) // 2)) for inner in kind]) is not None
        return frozenset(range(1, groups)) if is_possible else frozenset()
    return frozenset(
        kept for kept in range(1, groups) if config_changes(model, [(inner, range(kept)) for inner in kind]) is not None
    )


def _has_config(model: nn.Module) -> bool:
    """Return whether a model is one of transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def config_changes(model: Any, blocks: Blocks) -> dict[str, int] | None:
    """Return the changes of the config that give just these blocks, all of one kind, other sizes; None if none do.

    The model of the changed config is built on the meta device, and its sizes are compared.
    """
    if not _has_config(model):
        return None
    owners, groups = [inner.owner for inner, _ in blocks], {len(kept) for _, kept in blocks}
    expected = _sizes(without_groups(model, blocks), owners)
    # of size 0, the model is built, but may not be initialised
    if len(groups) > 1 or 0 in groups:
        return None
    for changes in _proposals(model.config, blocks[0][0], groups.pop()):
        config = copy.deepcopy(model.config)
        try:
            for key, value in changes.items():
                setattr(config, key, value)
            # as when it is loaded: configs check some combinations, such as a hidden size that heads divide
            config = type(config).from_dict(config.to_dict())
            with torch.device("meta"):
                built = type(model)(config)
        # a config may refuse a combination, and a model may compute impossible sizes from it
        except Exception:
            continue
        if _sizes(built, owners) == expected:
            return changes
    return None


def _sizes(model: nn.Module, owners: Sequence[str]) -> tuple[dict[str, torch.Size], list[dict[str, int | float]]]:
    """Return the shapes of a model's tensors, and the numbers among the attributes of some of its modules."""
    modules = [module for owner in owners for module in model.get_submodule(owner).modules()]
    numbers = [{k: v for k, v in vars(module).items() if type(v) in (int, float)} for module in modules]
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, numbers


def _proposals(config: Any, inner: InnerFeatures, kept: int) -> Iterator[dict[str, int]]:
    values = vars(config)
    if inner.groups < inner.size:
        counts = {k: v for k, v in values.items() if type(v) is int and is_head_count(k) and v and not v % inner.groups}
        if counts:
            changes = {key: value * kept // inner.groups for key, value in counts.items()}
            yield {**changes, "head_dim": inner.size // max(counts.values())}
        return
    # None stands for a default, as in GPT-2
    widths = [k for k, v in values.items() if (type(v) is int and v == inner.size) or (v is None and "inner" in k)]
    yield from ({key: kept} for key in widths)
    yield dict.fromkeys(widths, kept)


def narrow_attributes(model: Any, chosen: Mapping[str, LayerCandidate]) -> None:
    """Set the sizes of narrowed blocks in modules and in the config, or mark those that the config cannot say.

    To be called while the layers are still dense.
    """
    narrow = [c for c in chosen.values() if isinstance(c, NarrowCandidate)]
    by_shape: dict[object, list[tuple[InnerFeatures, tuple[int, ...]]]] = {}
    for candidate in narrow:
        if candidate.inner is not None and candidate.name == candidate.inner.consumer:
            by_shape.setdefault(candidate.inner.shape, []).append((candidate.inner, candidate.kept))
    all_changes = [(blocks, config_changes(model, blocks)) for blocks in by_shape.values()]
    for blocks, changes in all_changes:
        for key, value in (changes or {}).items():
            setattr(model.config, key, value)
        for inner, kept in blocks:
            attributes = inner.attributes_for(len(kept))
            set_attributes(model, attributes)
            if changes is None:
                start = len(inner.owner) + 1 if inner.owner else 0
                relative = {name[start:]: values for name, values in attributes.items()}
                mark_narrowed(model.get_submodule(inner.owner), [name[start:] for name in inner.layers], relative)
