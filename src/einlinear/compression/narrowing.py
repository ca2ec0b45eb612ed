"""Narrow candidates: blocks of which the most useful inner features are kept, while all layers stay plain and dense.

A consumer with weight W and inputs of second moment C that loses the inputs R, and whose other columns are fitted
again, has the error tr(W_R [C^-1]_RR^-1 W_R^T). The groups with the smallest one are removed first, a few at a time;
after each removal C^-1 and W become those of the inputs that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear.compression.calibration import InputStatistics
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.factor_rounding import round_factors
from einlinear.compression.inner_features import InnerFeatures
from einlinear.compression.sensitivity import Sensitivity
from einlinear.conversion.replacement import structured_like
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.nn.narrowed import copy_into, resized
from einlinear.nn.quantized_linear import QuantizedLinear, quantized_bytes
from einlinear.structures import FAMILIES, structure
from einlinear.structures.families import did_you_mean

# in `structures`: with UNIFORM, all blocks of one kind keep the same number
NARROW, UNIFORM = "narrow", "narrow(uniform=True)"


def check_narrow(families: Sequence[str]) -> None:
    """Raise ValueError for a misspelt "narrow", or other arguments; other words are left to `structure`."""
    for family in families:
        name = family.partition("(")[0].strip()
        if name == NARROW and family not in (NARROW, UNIFORM):
            raise ValueError(f"{NARROW} takes no argument but uniform=True, as in {UNIFORM!r}, not {family!r}")
        hint = "" if name in FAMILIES else did_you_mean(name, [*FAMILIES, NARROW])
        if name != NARROW and repr(NARROW) in hint:
            raise ValueError(f"unknown family {name!r}.{hint}")


# widths of a feed-forward block at least, which are multiples of a power of two
_WIDTHS = 24
# the groups between two widths are removed in as many parts
_PARTS = 4


@dataclass(frozen=True)
class NarrowCandidate(LayerCandidate):
    """One layer's part in a block that keeps some groups of its inner features: a dense layer with fewer features."""

    inner: InnerFeatures | None = None
    name: str = ""
    kept: tuple[int, ...] = ()

    @property
    def structure(self) -> str:
        assert self.inner is not None
        unit = "" if self.inner.groups == self.inner.size else " heads"
        return f"narrow({len(self.kept)} of {self.inner.groups}{unit})"

    @property
    def share(self) -> float:
        """The fraction of the inner features that is kept."""
        assert self.inner is not None
        return len(self.kept) / self.inner.groups

    @property
    def selected(self) -> tuple[slice | list[int], slice | list[int]]:
        """The rows and the columns of the weight that are kept."""
        assert self.inner is not None
        if self.name == self.inner.consumer:
            return slice(None), self.inner.inputs(self.kept)
        return self.inner.outputs(self.name, self.kept), slice(None)


# candidates of all layers of a block, or of several blocks, that are chosen together
ModuleCandidate = Mapping[str, NarrowCandidate]


@dataclass(frozen=True)
class Removal:
    """Groups in the order of their removal, and the consumer's relative squared errors by the number of groups kept."""

    order: tuple[int, ...]
    errors: dict[int, float]

    def kept(self, groups: int) -> tuple[int, ...]:
        return tuple(sorted(self.order[len(self.order) - groups :]))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Removal:
        return cls(tuple(map(int, record["order"])), {int(kept): float(e) for kept, e in record["errors"].items()})


@torch.no_grad()
def removal(consumer: Any, inner: InnerFeatures, _: InputStatistics, moment: Tensor) -> dict[str, Any]:
    """Return the record of a `Removal` of the inputs of a layer, with damped second moment (in, in)."""
    weight, inverse = weight_matrix(consumer).double(), torch.linalg.inv(moment.double())
    energy = ((weight @ moment.double()) * weight).sum().clamp(min=1e-300)
    each, multiple = inner.size // inner.groups, 1 << max((inner.groups // _WIDTHS).bit_length() - 1, 0)
    step = max(1, multiple // _PARTS)
    alive, error = torch.arange(inner.groups, device=weight.device), 0.0
    order: list[int] = []
    errors: dict[str, float] = {}
    while len(alive):
        # to the next multiple first
        count = min(len(alive), (len(alive) - 1) % step + 1)
        gone = _costs(weight, inverse, each).argsort()[:count]
        is_left = torch.ones(len(alive), dtype=torch.bool, device=alive.device).index_fill_(0, gone, False)
        inputs_left = is_left.repeat_interleave(each)
        removed, left = (~inputs_left).nonzero()[:, 0], inputs_left.nonzero()[:, 0]
        # C^-1_RR^-1 times the rows R of C^-1 and of W^T
        solved = torch.linalg.solve(
            inverse[removed][:, removed], torch.cat([inverse[removed][:, left], weight[:, removed].T], 1)
        )
        error += float((solved[:, len(left) :] * weight[:, removed].T).sum())
        of_inputs = solved[:, : len(left)]
        weight = weight[:, left] - weight[:, removed] @ of_inputs
        inverse = inverse[left][:, left] - inverse[left][:, removed] @ of_inputs
        order += alive[gone].tolist()
        alive = alive[is_left]
        if len(alive) % multiple == 0 and (len(alive) or inner.removable):
            errors[str(len(alive))] = min(max(error / float(energy), 0.0), 1.0)
    return {"order": order, "errors": errors}


def _costs(weight: Tensor, inverse: Tensor, each: int) -> Tensor:
    """Return the errors after the removal of one group of inputs, (groups,)."""
    groups = len(inverse) // each
    blocks = inverse.unflatten(0, (groups, each)).unflatten(2, (groups, each)).diagonal(dim1=0, dim2=2)
    # (groups, each, out)
    columns = weight.T.unflatten(0, (groups, each))
    costs: Tensor = (torch.linalg.solve(blocks.permute(2, 0, 1), columns) * columns).sum((1, 2))
    return costs


def module_candidates(
    found: Sequence[InnerFeatures],
    layers: Mapping[str, Any],
    removals: Mapping[str, Removal],
    candidates: Mapping[str, Sequence[LayerCandidate]],
    sensitivities: Mapping[str, Sensitivity],
    uniform: bool,
) -> list[ModuleCandidate]:
    """Return candidates of whole blocks in the precisions of dense layers, or with `uniform` of all blocks of a kind.

    Args:
        found: the blocks.
        layers: the dense ones by name.
        removals: by the name of the consumer.
        candidates: of each layer alone, of which "dense" ones give the errors of rounding.
        sensitivities: by layer.
        uniform: blocks of one kind keep the same number of groups.
    """
    result: list[ModuleCandidate] = []
    together: dict[object, dict[str, NarrowCandidate]] = {}
    for inner in found:
        dense = {name: {c.precision: c for c in candidates[name] if c.spec == "dense"} for name in inner.layers}
        shared = [p for p in dense[inner.consumer] if all(p in of_layer for of_layer in dense.values())]
        for kept, error in removals[inner.consumer].errors.items():
            if inner.allowed is not None and kept not in inner.allowed:
                continue
            # without any features there is nothing to round
            for precision in shared if kept else [""]:
                module: dict[str, NarrowCandidate] = {}
                for name in inner.layers:
                    whole, is_consumer = dense[name][precision], name == inner.consumer
                    own = whole.error + (error if is_consumer else 0.0)
                    change = sensitivities[name].at(own) if is_consumer else whole.output_change
                    cost = _cost(whole, inner, name, kept, layers[name])
                    groups = removals[inner.consumer].kept(kept)
                    module[name] = NarrowCandidate("dense", cost, own, change, precision, inner, name, groups)
                if uniform and kept:
                    together.setdefault((inner.shape, kept, precision), {}).update(module)
                elif not uniform:
                    result.append(module)
    return [*result, *together.values()]


def _cost(whole: LayerCandidate, inner: InnerFeatures, name: str, kept: int, layer: Any) -> int:
    if not whole.precision:
        return whole.cost * kept // inner.groups
    return quantized_bytes(structure("dense", *_size(layer, inner, name, kept)), whole.precision)


def _size(layer: Any, inner: InnerFeatures, name: str, kept: int) -> tuple[int, int]:
    """Return the features, in and out, of the layer in a block that keeps a number of groups."""
    in_features, out_features = features(layer)
    if name == inner.consumer:
        return in_features * kept // inner.groups, out_features
    return in_features, out_features * kept // inner.groups


def narrow_size(old: Any, choice: NarrowCandidate) -> tuple[int, int]:
    """Return the features, in and out, of a candidate's layer."""
    assert choice.inner is not None
    return _size(old, choice.inner, choice.name, len(choice.kept))


def narrow_layer(old: Any, choice: NarrowCandidate) -> Any:
    """Return an uninitialised layer of a candidate's size and precision."""
    layer = resized(old, *narrow_size(old, choice))
    return structured_like(layer, "dense", precision=choice.precision) if choice.precision else layer


@torch.no_grad()
def fit_narrow(
    old: Any, choice: NarrowCandidate, damping: float, inputs: InputStatistics, moment: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a layer with fewer features whose outputs come closest to a dense one's, and how close."""
    weight, layer, (rows, columns) = weight_matrix(old), narrow_layer(old, choice), choice.selected
    target = inputs.target_weight(weight, damping)
    fitted, approximation = target[rows], target.clone()
    if isinstance(columns, list):
        approximation, moment = torch.zeros_like(target), moment[columns]
        crossed = moment @ target.T.to(moment)
        moment = moment[:, columns]
        fitted = torch.linalg.solve(moment, crossed).T.to(target.dtype)
    if isinstance(layer, QuantizedLinear):
        layer.store(round_factors(layer.structure, [fitted], layer.formats, fitted, moment))
    else:
        copy_into(layer, fitted)
    approximation[rows, columns] = _dense_weight(layer)
    if layer.bias is not None:
        layer.bias.copy_(inputs.corrected_bias(old.bias, weight, approximation)[rows])
    # a refit that changes nothing leaves the noise of rounding
    error = max(inputs.relative_error(weight, approximation), 0.0)
    return layer.state_dict(), {"error": error, "tokens": inputs.tokens}


@torch.no_grad()
def in_full_size(old: Any, layer: Any, choice: LayerCandidate) -> Any:
    """Return a layer that computes the same features as a narrow one, at the places of the dense one; or the layer.

    In a model whose blocks keep their size, one layer at a time can be replaced.
    """
    if not isinstance(choice, NarrowCandidate):
        return layer
    rows, columns = choice.selected
    full, weight, narrow = copy.deepcopy(old), weight_matrix(old).detach().clone(), _dense_weight(layer)
    if isinstance(columns, list):
        weight.zero_()
    weight[rows, columns] = narrow
    copy_into(full, weight)
    if full.bias is not None:
        full.bias[rows] = layer.bias
    return full


def _dense_weight(layer: Any) -> Tensor:
    return layer.dense_weight() if isinstance(layer, QuantizedLinear) else weight_matrix(layer)
