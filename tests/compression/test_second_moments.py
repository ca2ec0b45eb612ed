"""Moments of inputs: what they say of errors, targets and biases, against the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einlinear.compression.calibration import InputStatistics, SecondMomentAccumulator


def drawn(tokens: int = 400, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The compressed model's inputs and the original's, which resemble each other, with means."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    original = torch.randn(tokens, features, generator=generator) @ mix + torch.randn(features, generator=generator)
    return original + 0.3 * torch.randn(tokens, features, generator=generator) + 0.5, original


def collected(x: Tensor, original: Tensor | None, centred: bool, w: Tensor) -> InputStatistics:
    accumulator = SecondMomentAccumulator(x.shape[1], x.device, 0 if original is None else len(w) + 2)
    for part in range(0, len(x), 64):
        # the outputs of another layer with the same inputs come first
        y = None if original is None else original[part : part + 64] @ torch.cat([torch.ones(2, 6), w]).T
        accumulator.add(x[part : part + 64], y)
    return accumulator.statistics(w, 0 if original is None else 2, centred=centred)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_the_error_is_that_of_the_outputs(centred: bool, paired: bool) -> None:
    x, original = drawn()
    before = original if paired else x
    w, v, bias = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)
    inputs = collected(x, original if paired else None, centred, w)
    right = before @ w.T + bias
    found = x @ v.T + (inputs.corrected_bias(bias, w, v) if centred else bias)
    energy = (right - (right.mean(0) if centred else bias)).square().sum(1).mean()
    assert inputs.output_energy(w) == pytest.approx(float(energy), rel=1e-4)
    assert inputs.relative_error(w, v) == pytest.approx(
        float((right - found).square().sum(1).mean() / energy), rel=1e-4
    )


@pytest.mark.parametrize("centred", [False, True])
def test_the_target_is_the_best_weight_of_all(centred: bool) -> None:
    x, original = drawn()
    w = torch.randn(4, 6)
    inputs = collected(x, original, centred, w)
    design = torch.cat([x, torch.ones(len(x), 1)], 1) if centred else x
    best = torch.linalg.lstsq(design, original @ w.T).solution[:6].T
    torch.testing.assert_close(inputs.target_weight(w, 0.0), best, rtol=1e-3, atol=1e-3)
    assert inputs.relative_error(w, best) < 0.95 * inputs.relative_error(w, w)
    torch.testing.assert_close(inputs.target_weight(w, 1e9), w)  # damped towards the original
    assert collected(x, None, centred, w).target_weight(w, 0.0) is w


def test_means_far_above_the_variance() -> None:
    """As of features that are nearly constant: what varies must not drown in the rounding of what does not."""
    x, original = drawn()
    w = torch.randn(4, 6)
    near, far = (collected((x + offset).float(), (original + offset).float(), True, w) for offset in (0.0, 1e4))
    assert near.original is not None
    assert far.original is not None
    torch.testing.assert_close(far.second_moment, near.second_moment, rtol=0.02, atol=0.02)
    torch.testing.assert_close(far.original.cross_moment, near.original.cross_moment, rtol=0.02, atol=0.02)
    torch.testing.assert_close(far.mean, near.mean + 1e4)
    assert bool((torch.linalg.eigvalsh(far.second_moment) > 0).all())


def test_nothing_is_known_of_white_inputs() -> None:
    inputs, w, v = InputStatistics.white(6, torch.device("cpu")), torch.randn(4, 6), torch.randn(4, 6)
    assert inputs.relative_error(w, v) == pytest.approx(float((w - v).square().sum() / w.square().sum()), rel=1e-5)
    assert torch.equal(inputs.corrected_bias(torch.ones(4), w, v), torch.ones(4))


def test_inputs_that_are_no_numbers() -> None:
    x, _ = drawn()
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="its inputs have values that are NaN or infinite"):
        SecondMomentAccumulator(6, x.device).add(x)
