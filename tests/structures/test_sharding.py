"""Tensor parallelism from the pattern: what the devices compute is the whole product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.families import PATTERNS, SAMPLES, structures
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.structures import DoesNotFit, Structure
from einlinear.structures.sharding import FactorGroup, Part, shard


@pytest.mark.parametrize(
    ("spec", "out", "into"),
    [
        ("dense", "o", "i"),
        ("low_rank", "o", "i"),
        ("kronecker", None, None),
        ("tt(rank=2)", None, None),
        ("btt(rank=2)", "f", "g"),
        ("btt(cores=3)", "o1", "i3"),
        # not the slowest: (e f)
        ("monarch", "f", "g"),
        # the second term reads (k n)
        ("dyad", "n", None),
        ("dyad(variant=ot)", None, "n"),
        ("block_diagonal", "n", "n"),
        ("blast(blocks=4, rank=2)", "i", "j"),
        # an axis of size 1 splits nothing
        ("(g a), g r f a, f e g r -> (f e) where g=1, f=1, r=8", "e", "a"),
        # factors without outputs, and without inputs
        ("i, i, r i, s r, o s -> o where r=3, s=2", "o", "i"),
    ],
)
def test_the_common_axis(spec: str, out: str | None, into: str | None) -> None:
    s = el.structure(spec, 64, 128)
    assert (s.sharding("out"), s.sharding("in")) == (out, into)
    with pytest.raises(ValueError, match="side must be 'in' or 'out', not 'left'"):
        s.sharding("left")


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("spec", [*(spec for specs in SAMPLES.values() for spec in specs), *PATTERNS])
def test_devices_together_compute_the_product(spec: str, side: str, devices: int) -> None:
    torch.manual_seed(0)
    for s in structures(spec, [(64, 128), (64, 64), (63, 64), (64, 63)]):
        factors = [torch.randn(shape, dtype=torch.float64) for shape in s.shapes]
        x = torch.randn(3, s.in_features, dtype=torch.float64)
        try:
            split = shard(s, side, devices)
        except DoesNotFit:
            continue
        outputs = []
        for rank in range(devices):
            own = x if side == "out" else x.chunk(devices, 1)[rank]
            parts = zip(s.factors, split.axes, factors, strict=True)
            local = [m if a is None else m.chunk(devices, f.axes.index(a))[rank] for f, a, m in parts]
            outputs.append([output(s, part, local, own, side, rank, devices) for part in split.parts])
        # devices are summed before the replicated factors of "in"
        sums = [sum(ys) for ys in zip(*outputs, strict=True)] if side == "in" else []
        y = (
            torch.cat([sum(ys) for ys in outputs], 1)
            if side == "out"
            else sum(  # type: ignore[arg-type]
                z if part.replicated is None else run(part.replicated, factors, z)  # type: ignore[arg-type]
                for part, z in zip(split.parts, sums, strict=True)
            )
        )
        torch.testing.assert_close(y, x @ ops.dense_weight(s, factors).T)
        common = s.sharding(side)
        shared = sum(f.macs for f, axis in zip(s.factors, split.axes) if axis is None)
        assert split.macs <= shared + (s.macs - shared) / devices + 1
        if common is not None and {*split.axes} == {common} and devices > 1:
            assert split.macs * devices == s.macs


def run(group: FactorGroup, factors: list[Tensor], x: Tensor) -> Tensor:
    return ops.linear(group.structure, [factors[i] for i in group.factors], x, backend="reference")


def output(s: Structure, part: Part, factors: list[Tensor], x: Tensor, side: str, rank: int, devices: int) -> Tensor:
    if side == "out" and part.replicated is not None:
        x = run(part.replicated, factors, x)
    elif side == "out" and part.view is not None:
        x = F.pad(x, (0, part.pads)).unflatten(-1, part.view).chunk(devices, -2)[rank].flatten(1)
    y = run(part.local, factors, x)
    if side == "in" and part.view is not None:
        whole = y.new_zeros(len(y), *part.view)
        target = whole.chunk(devices, -2)[rank]
        target.copy_(y.view(target.shape))
        y = whole.flatten(1)[:, : s.out_features]
    return y


def test_what_is_summed() -> None:
    assert shard(el.structure("btt", 64, 128), "out", 2).all_reduces == (64,)
    assert shard(el.structure("btt", 64, 128), "in", 2).all_reduces == (128,)
    low_rank = el.structure("low_rank(rank=3)", 64, 128)
    assert [shard(low_rank, side, 2).all_reduces for side in ("out", "in")] == [(3,), (3,)]
    assert shard(low_rank, "in", 2, can_cut=False).all_reduces == (128,)
    assert shard(low_rank, "in", 2, can_cut=False).summed == (1,)
    # of a rank above the features of the layer, these are fewer
    wide = el.structure("low_rank(rank=100)", 64, 128)
    assert [shard(wide, side, 2).all_reduces for side in ("out", "in")] == [(64,), (100,)]
    assert shard(wide, "out", 2).summed == (0,)
    assert shard(el.structure("tt", 64, 128), "out", 2).summed != ()
    with pytest.raises(ValueError, match="side must be 'in' or 'out', not 'left'"):
        shard(wide, "left", 2)
