"""Tensor parallelism of a structured matrix: what each of several devices computes, and what they sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from einlinear.structures.pattern import Axes, Pattern, TermPattern
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.spec import structure as make_structure
from einlinear.structures.structured_matrix import Structure, Term


@dataclass(frozen=True)
class FactorGroup:
    """Some factors of a structured matrix, as a matrix of their own.

    Attributes:
        structure: of this matrix.
        factors: the indices in `Structure.factors` of the whole matrix, in the order of `structure.factors`.
    """

    structure: Structure
    factors: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a device computes for one term, or for all terms together.

    Attributes:
        local: the factors that have the split axis, and those that are applied to slices.
        replicated: the factors that every device applies to the same features: before `local` if outputs are split,
            after the sum over devices if inputs are. None if there are none.
        view: None, or the features of the other side as (slower, axis, faster) where `local` has a slice of these too.
        pads: the number of padded features in `view`.
    """

    local: FactorGroup
    replicated: FactorGroup | None = None
    view: tuple[int, int, int] | None = None
    pads: int = 0


@dataclass(frozen=True)
class Sharding:
    """How devices share a structured matrix: every device has consecutive output or input features.

    Attributes:
        structure, side, devices: the matrix, "out" or "in" for the features that are split, the number of devices.
        parts: what a device computes; its output is their sum.
        axes: of each factor in `structure.factors`, the axis that is split, or None if the factor is replicated.
        summed: the indices of replicated factors that are applied to slices: their gradients are summed over devices.
    """

    structure: Structure
    side: str
    devices: int
    parts: tuple[Part, ...]
    axes: tuple[str | None, ...]
    summed: tuple[int, ...]

    @property
    def features(self) -> int:
        """The number of features of one device."""
        return (self.structure.out_features if self.side == "out" else self.structure.in_features) // self.devices

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one device for one input vector."""
        groups = [group for part in self.parts for group in (part.local, part.replicated) if group is not None]
        return sum(group.structure.macs for group in groups)

    @property
    def all_reduces(self) -> tuple[int, ...]:
        """The features in each all-reduce of one input vector: in the backward pass for "out", the forward for "in"."""
        is_out, s = self.side == "out", self.structure
        cuts = [part.replicated.structure for part in self.parts if part.replicated is not None]
        sizes = [cut.out_features if is_out else cut.in_features for cut in cuts]
        return (*sizes, *[s.in_features if is_out else s.out_features][: len(self.parts) - len(cuts)])


@lru_cache(maxsize=4096)
def shard(structure: Structure, side: str, devices: int, can_cut: bool = True) -> Sharding:
    """Split the output ("out") or the input features ("in") of a structured matrix over devices.

    Every term is split along the slowest axis of the side, so that the features of a device are consecutive. Factors
    without this axis are replicated. Those before the first factor that has the axis ("out"), or after the last ("in"),
    see the same features on every device: devices then sum the features in between, if these are not more than the
    inputs or outputs.

    Args:
        structure: of the whole matrix.
        side: "out" or "in".
        devices: their number.
        can_cut: whether a term may be cut into a replicated and a local part, whose intermediate devices sum; False:
            they sum only inputs and outputs.

    Raises:
        DoesNotFit: the axis cannot be divided by the number of devices, or features of this side are padded.
        ValueError: a side other than "in" and "out".

    Example:
        >>> import einlinear as el
        >>> from einlinear.structures.sharding import shard
        >>> (part,) = shard(el.structure("low_rank(rank=4)", 64, 32), "out", 2).parts
        >>> str(part.replicated.structure.pattern), str(part.local.structure.pattern)
        ('i, r i -> r where i=64, r=4', 'r, o r -> o where r=4, o=16')
    """
    if side not in ("in", "out"):
        raise ValueError(f"side must be 'in' or 'out', not {side!r}")
    by_term = structure.by_term(range(len(structure.factors)))
    axes = [_slowest_axis(structure, term, side, devices) for term in structure.terms]
    parts = [
        _part(structure, term, indices, axis, side, devices, can_cut)
        for (term, indices), axis in zip(by_term, axes, strict=True)
    ]
    if len(parts) > 1 and len({*axes}) == 1 and not any(part.view or part.replicated for part in parts):
        # terms that split the same features are one structure
        first, terms = parts[0].local.structure, [part.local.structure.pattern.terms[0] for part in parts]
        sizes = {**dict(structure.sizes), axes[0]: dict(first.sizes)[axes[0]]}
        parts = [Part(_group(terms, range(len(structure.factors)), sizes, first.in_features, first.out_features))]
    owners = [axis for (term, _), axis in zip(by_term, axes) for _ in term.factors]
    sharded = [axis if axis in factor.axes else None for axis, factor in zip(owners, structure.factors, strict=True)]
    summed = [index for part in parts for index in part.local.factors if sharded[index] is None]
    return Sharding(structure, side, devices, tuple(parts), tuple(sharded), tuple(summed))


def _slowest_axis(structure: Structure, term: Term, side: str, devices: int) -> str:
    sizes, is_out = dict(structure.sizes), side == "out"
    axes, features = (term.outputs, structure.out_features) if is_out else (term.inputs, structure.in_features)
    padding = structure.padding(term)[is_out]
    if padding and devices > 1:
        advice = f"take {features + padding} {side}put features, or a structure without padding"
        raise DoesNotFit(f"{structure}: its {features} {side}put features are padded and cannot be shared: {advice}")
    axis = next((axis for axis in axes if sizes[axis] > 1), axes[0])
    if sizes[axis] % devices:
        numbers = [str(n) for n in range(2, sizes[axis] + 1) if sizes[axis] % n == 0]
        advice = f"{' or '.join(numbers)} devices can" if numbers else "leave the layer replicated"
        owner = f"axis {axis!r} of its {side}put features, of size {sizes[axis]}"
        raise DoesNotFit(f"{structure}: {devices} devices cannot share the {owner}; {advice}")
    return axis


def _part(
    structure: Structure, term: Term, indices: Sequence[int], axis: str, side: str, devices: int, can_cut: bool
) -> Part:
    """Return what a device computes for one term, whose factors have these indices."""
    is_out, sizes = side == "out", dict(structure.sizes)
    local_sizes = {**sizes, axis: sizes[axis] // devices}
    ins, outs = structure.in_features, structure.out_features
    local_ins, local_outs = (ins, outs // devices) if is_out else (ins // devices, outs)

    def group(part: slice, inputs: Axes, outputs: Axes, sizes: Mapping[str, int], ins: int, outs: int) -> FactorGroup:
        pattern = TermPattern(inputs, tuple(factor.axes for factor in term.factors[part]), outputs)
        return _group([pattern], indices[part], sizes, ins, outs)

    other = term.inputs if is_out else term.outputs
    if axis in other:
        at, size = other.index(axis), _size(other, local_sizes)
        local_ins, local_outs = (size, local_outs) if is_out else (local_ins, size)
        local = group(slice(None), term.inputs, term.outputs, local_sizes, local_ins, local_outs)
        view = _size(other[:at], sizes), sizes[axis], _size(other[at + 1 :], sizes)
        return Part(local, None, view, structure.padding(term)[not is_out])
    having = [i for i, factor in enumerate(term.factors) if axis in factor.axes]
    cut = having[0] if is_out else having[-1] + 1
    if not (can_cut and _is_valid_cut(term, cut, sizes, limit=ins if is_out else outs)):
        return Part(group(slice(None), term.inputs, term.outputs, local_sizes, local_ins, local_outs))
    between = term.factors[cut].source
    size, before, after = _size(between, sizes), slice(None, cut), slice(cut, None)
    if is_out:
        replicated = group(before, term.inputs, between, sizes, ins, size)
        return Part(group(after, between, term.outputs, local_sizes, size, local_outs), replicated)
    replicated = group(after, between, term.outputs, sizes, size, outs)
    return Part(group(before, term.inputs, between, local_sizes, local_ins, size), replicated)


def _is_valid_cut(term: Term, cut: int, sizes: Mapping[str, int], limit: int) -> bool:
    """Return whether the factors before and from `cut` are matrices, with at most `limit` features in between."""
    parts = term.factors[:cut], term.factors[cut:]
    if not all(parts) or not (between := term.factors[cut].source):
        return False
    # no pattern passes an axis on that is in no factor
    is_carried = all(any(axis in factor.axes for factor in part) for part in parts for axis in between)
    return is_carried and _size(between, sizes) <= limit


def _group(
    terms: Sequence[TermPattern], indices: Sequence[int], sizes: Mapping[str, int], ins: int, outs: int
) -> FactorGroup:
    """Return the structure of patterns whose factors, in the written order, have these indices."""
    pattern = Pattern(tuple(terms))
    structure = make_structure(str(pattern.with_sizes({axis: sizes[axis] for axis in pattern.axes})), ins, outs)
    # F9 comes before F10
    names = sorted((factor.name for factor in structure.factors), key=lambda name: (len(name), name))
    index_of = dict(zip(names, indices, strict=True))
    return FactorGroup(structure, tuple(index_of[factor.name] for factor in structure.factors))


def _size(axes: Axes, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
