"""Stacks of equal structures: their factors, counts, outputs, and what cannot be stacked."""

from __future__ import annotations

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from tests.random_patterns import random_structure

import einlinear as el
from einlinear import ops
from einlinear.structures import DoesNotFit, Structure, stack

SPECS = [spec for specs in SAMPLES.values() for spec in specs]


def check(structure: Structure, layers: int) -> None:
    """The rows of a stacked matrix are those of its matrices, one after the other."""
    stacked = stack(structure, layers)
    assert stacked.shapes == tuple((layers, *shape) for shape in structure.shapes)
    assert [factor.name for factor in stacked.factors] == [factor.name for factor in structure.factors]
    assert (stacked.params, stacked.macs) == (layers * structure.params, layers * structure.macs)
    # operators and checkpoints have the spec alone
    assert el.structure(stacked.spec, stacked.in_features, stacked.out_features) == stacked
    factors = [torch.randn(layers, *shape, dtype=torch.float64) for shape in structure.shapes]
    each = [ops.dense_weight(structure, matrix) for matrix in zip(*factors, strict=True)]
    torch.testing.assert_close(ops.dense_weight(stacked, factors), torch.cat(each))


@pytest.mark.parametrize("spec", [*SPECS, *PATTERNS, "i, q i, o q -> o where q=3", "(q2 q), o q2 q -> o"])
def test_every_family(spec: str) -> None:
    for structure in structures(spec, [(48, 48), (48, 96), (47, 24)]):
        for layers in (1, 2, 3):
            check(structure, layers)


def test_random_sums() -> None:
    stacked = 0
    for seed in range(60):
        structure = random_structure(seed)
        try:
            check(structure, 3)
            stacked += 1
        except DoesNotFit:
            assert structure.out_features % 2
    assert stacked > 30


def test_padded_outputs_are_not_stacked() -> None:
    """The padding of one matrix would lie before the next one."""
    with pytest.raises(DoesNotFit, match="47 has padded outputs, which cannot be stacked"):
        stack(el.structure("btt", 64, 47), 2)
