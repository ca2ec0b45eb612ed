"""Codes and scales of weights: exact cases, the errors that they leave, and degenerate inputs."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_projection_of_outputs import correlated
from torch import Tensor

from einlinear.compression.rounding import round_to_least_error, round_to_nearest
from einlinear.ops.integer_format import IntegerFormat

FORMATS = [IntegerFormat(bits, group) for bits in (3, 4, 8) for group in (None, 32, 5)]


def output_error(w: Tensor, quantised: tuple[Tensor, Tensor], format: IntegerFormat, moment: Tensor) -> float:
    difference = (w - format.decode(*quantised)).double()
    return float((difference @ moment.double() * difference).sum())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_to_nearest_is_at_most_half_a_step_off(format: IntegerFormat) -> None:
    w = torch.randn(2, 7, 67)
    codes, scales = round_to_nearest(w, format)
    assert (codes.dtype, codes.shape) == (torch.int8, w.shape)
    assert scales.shape == (2, 7, format.groups(67))
    error = (w - format.decode(codes, scales)).abs()
    # the largest entry may be clipped by the rounding of its scale to eight bits
    clipped = format.largest * 2**-8
    assert (error <= format.by_column(scales.float(), 67) * (0.501 + clipped)).all()
    assert error.max() > 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_weights_that_a_format_has_are_kept(format: IntegerFormat) -> None:
    codes = torch.randint(-format.largest, format.largest + 1, (6, 64))
    codes[:, ::5] = format.largest
    w = format.decode(
        codes, torch.tensor([2.0**-3, 1.0, 2.0**60, 2.0**-60, 3.0, 1.0])[:, None].expand(6, format.groups(64))
    )
    for quantised in (round_to_nearest(w, format), round_to_least_error(w, correlated(64), format)):
        assert torch.equal(quantised[0], codes.to(torch.int8))
        assert torch.equal(format.decode(*quantised), w)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_least_error_is_below_that_of_nearest(format: IntegerFormat) -> None:
    torch.manual_seed(0)
    w, moment = torch.randn(24, 150), correlated(150)
    least = output_error(w, round_to_least_error(w, moment, format), format, moment)
    nearest = output_error(w, round_to_nearest(w, format), format, moment)
    assert 0 < least < 0.75 * nearest


def test_columns_make_up_for_errors_of_earlier_ones() -> None:
    # both inputs are the same: only the sum of the two entries counts, 0.8 + 1.4 = 1 + 1.2, and then rounds to 1 + 1
    moment = torch.ones(2, 2)
    moment[0, 0] += 1e-3
    w = torch.tensor([[0.6, 0.6, 7.0]])
    moment = torch.block_diag(moment, torch.ones(1, 1))
    codes, scales = round_to_least_error(w, moment, IntegerFormat(4), damping=0.0)
    assert scales.item() == pytest.approx(1.0)
    assert sorted(codes[0, :2].tolist()) == [0, 1]
    assert round_to_nearest(w, IntegerFormat(4))[0].tolist() == [[1, 1, 7]]


def test_the_error_is_little_above_that_of_the_best_codes() -> None:
    torch.manual_seed(1)
    format, moment = IntegerFormat(3), correlated(5)
    w = torch.randn(8, 5)
    codes, scales = round_to_least_error(w, moment, format, damping=1e-6)
    every_code = torch.cartesian_prod(*[torch.arange(-4, 4)] * 5)
    differences = (w[:, None] - every_code * scales.float()[:, None]).double()
    best = float(((differences @ moment.double()) * differences).sum(2).amin(1).sum())
    with_same_scales = (w / scales.float()).round().clamp(-4, 3)
    error, nearest = (output_error(w, (c, scales), format, moment) for c in (codes, with_same_scales))
    assert best - 1e-6 <= error < best + 0.3 * (nearest - best)


def test_a_batch_is_as_its_matrices() -> None:
    w, moments = torch.randn(2, 3, 5, 70), torch.stack([correlated(70), torch.eye(70)])[:, None].expand(2, 3, 70, 70)
    format = IntegerFormat(4, 32)
    codes, scales = round_to_least_error(w, moments, format)
    for i, j in ((0, 0), (1, 2)):
        alone = round_to_least_error(w[i, j], moments[i, j], format)
        assert (codes[i, j] == alone[0]).float().mean() > 0.99
        assert torch.equal(scales[i, j], alone[1])
    shared = round_to_least_error(w, moments[0, 0], format)
    assert torch.equal(shared[1][0], scales[0])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_degenerate_inputs(format: IntegerFormat) -> None:
    w = torch.randn(5, 40)
    w[2] = 0
    dead = correlated(40)
    dead[:, 3] = dead[3] = 0
    for moment in (dead, torch.zeros(40, 40), torch.ones(40, 40)):
        codes, scales = round_to_least_error(w, moment, format)
        assert format.decode(codes, scales).isfinite().all()
        assert (codes[2] == 0).all()
    # an input that never occurs keeps its weights, as if it were alone
    codes, scales = round_to_least_error(w, torch.diag(dead.diagonal()), format)
    assert torch.equal(
        codes[:, 3],
        (w[:, 3] / format.by_column(scales.float(), 40).expand(5, 40)[:, 3])
        .round()
        .clamp(-format.largest - 1, format.largest)
        .to(torch.int8),
    )
    column = torch.tensor([[3.0], [-0.5]])
    for codes, scales in (round_to_nearest(column, format), round_to_least_error(column, torch.ones(1, 1), format)):
        assert torch.allclose(format.decode(codes, scales), column, rtol=2**-7)
    for empty in (torch.zeros(0, 8), torch.zeros(3, 2, 0)):
        assert round_to_least_error(empty, torch.eye(empty.shape[-1]), format)[0].shape == empty.shape


def test_wrong_inputs_raise() -> None:
    format, broken = IntegerFormat(4), torch.full((2, 3), torch.nan)
    for call in (lambda: round_to_nearest(broken, format), lambda: round_to_least_error(broken, torch.eye(3), format)):
        with pytest.raises(ValueError, match="the weight has values that are NaN or infinite"):
            call()
    with pytest.raises(ValueError, match="the second moment has values that are NaN"):
        round_to_least_error(torch.ones(2, 3), torch.full((3, 3), torch.inf), format)
    with pytest.raises(ValueError, match=r"\(2, 2\) does not fit a weight of shape \(2, 3\).*must be 3"):
        round_to_least_error(torch.ones(2, 3), torch.eye(2), format)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        round_to_least_error(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), format)
