"""Layers that no structure fits stay dense, and the others are compressed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import einlinear as el


@pytest.mark.parametrize(
    ("sizes", "structures", "dense", "reason"),
    [
        (
            (64, 64, 1),
            ["low_rank", "monarch(blocks=4)", "btt(rank=2)", "blast(blocks=4, rank=8)"],
            "2",
            "no structure fits 64 -> 1",
        ),
        ((1, 64, 64), ["low_rank", "monarch(blocks=4)", "btt(rank=2)"], "0", "no structure fits 1 -> 64"),
        ((64, 64, 2), ["monarch(blocks=4)"], "2", "= 2 is fewer than blocks^2 = 16"),
        ((64, 64, 3), ["low_rank(rank=16)"], "2", "low_rank(rank=16) saves nothing"),
        ((64, 64, 13), ["block_diagonal(blocks=8)"], "2", "13 is not divisible by 8"),
        ((64, 64, 13), ["(g a), g e a -> (g e) where g=8"], "2", "13 is not divisible by 8"),
    ],
)
@pytest.mark.parametrize("has_data", [True, False])
def test_one_layer_that_nothing_fits(
    sizes: tuple[int, ...], structures: list[str], dense: str, reason: str, has_data: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    report = el.compress(model, 0.6, structures, [torch.randn(128, sizes[0])] if has_data else None)
    structured = {name for name, layer in model.named_modules() if isinstance(layer, el.Linear)}
    assert structured == {"0", "2"} - {dense}
    (left,) = [layer for layer in report.layers if layer.name == dense]
    assert left.structure == "dense"
    assert left.reason is not None
    assert reason in left.reason
    assert f"Stays dense: {dense}, {left.reason}." in str(report)
    assert "max_macs" not in str(report)
    assert report.params <= 0.6 * report.params_before


def test_a_prime_number_of_features() -> None:
    model = nn.Sequential(nn.Linear(4099, 16), nn.Tanh(), nn.Linear(16, 64))
    report = el.compress(model, 0.6, ["monarch"])
    assert report.layers[0].structure.startswith("monarch")
    assert report.params <= 0.6 * report.params_before
    assert model(torch.randn(2, 4099)).shape == (2, 64)


def test_a_budget_that_one_layer_cannot_reach_but_all_can() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512))
    report = el.compress(model, 0.1, ["low_rank"], [torch.randn(64, 8)])
    small = report.layers[0]
    assert small.params > 0.1 * small.params_before
    assert report.params <= 0.1 * report.params_before


def test_nothing_fits_any_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    with pytest.raises(ValueError, match=r"reached with monarch\(blocks=16\).*; 0: no structure fits 64 -> 64"):
        el.compress(model, 0.6, ["monarch(blocks=16)"], [torch.randn(64, 64)])
    with pytest.raises(ValueError, match="blast needs blocks="):  # a mistake of the user's, not of one layer
        el.compress(model, 0.6, ["blast"], [torch.randn(64, 64)])
