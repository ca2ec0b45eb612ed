"""Rounded factors: later ones make up for the errors of earlier ones."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_projection_of_outputs import correlated, error

from einlinear import ops
from einlinear.compression.factor_rounding import expanded, round_factors
from einlinear.compression.rounding import round_to_least_error
from einlinear.nn.quantized_linear import factor_formats
from einlinear.structures import structure

SPECS = ["low_rank(rank=24)", "monarch(blocks=2)", "btt(rank=3)", "blast(blocks=4, rank=32)", "dense"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("precision", ["int8", "int4(group=32)", "int3"])
def test_outputs_change_less_than_by_rounding_to_nearest(spec: str, precision: str) -> None:
    torch.manual_seed(0)
    s, w, moment = structure(spec, 96, 64), torch.randn(64, 96), correlated(96).float()
    factors, formats = ops.project(s, w, moment), factor_formats(s, precision)

    def rounded(second_moment: torch.Tensor | None) -> float:
        stored = round_factors(s, factors, formats, w, second_moment)
        return error(s, w, [expanded(*part) for part in zip(s.factors, stored, formats, strict=True)], moment)

    exact, least, nearest = error(s, w, factors, moment), rounded(moment), rounded(None)
    assert exact * 0.999 < least < exact + 0.8 * (nearest - exact)


def test_a_dense_layer_is_rounded_as_its_weight() -> None:
    s, w, moment = structure("dense", 40, 20), torch.randn(20, 40), correlated(40).float()
    formats = factor_formats(s, "int4")
    assert formats[0] is not None
    ((codes, scales),) = round_factors(s, [w], formats, w, moment)
    expected = round_to_least_error(w, moment, formats[0])
    assert (codes[0] == expected[0]).float().mean() > 0.99
    assert torch.equal(scales[0], expected[1])


def test_small_sums_stay_in_bfloat16() -> None:
    # the middle factor sums 4 blocks
    assert [f is None for f in factor_formats(structure("blast(blocks=4, rank=32)", 96, 64), "int4")] == [
        False,
        True,
        False,
    ]
    assert factor_formats(structure("low_rank(rank=8)", 96, 64), "bfloat16") == [None, None]
