"""The coordinate check, on random data: it must pass with the structure-aware rule and fail with the dense one."""

from __future__ import annotations

import pytest
import torch

import einlinear as el
from einlinear.nn import ResidualMLP
from einlinear.parametrize.coord_check import spread

WIDTHS = (64, 256, 1024)


def updates(structure: str, structure_aware: bool) -> dict[int, float]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 48), torch.randint(10, (256,))

    def build(width: int) -> ResidualMLP:
        torch.manual_seed(width)
        return el.init_(
            ResidualMLP(48, width, 10, depth=1, structure=structure, bias=False), base=None, zero=ResidualMLP.ZERO
        )

    found = el.coord_check(
        build,
        WIDTHS,
        [(x, y)],
        x[:64],
        lr=3e-3,
        base_width=64,
        layers="blocks.0",
        steps=20,
        lr_scale={"input": 0.1},
        structure_aware=structure_aware,
    )
    assert [(c.width, c.layer) for c in found] == [(width, "blocks.0") for width in WIDTHS]
    assert all(c.size > 0 for c in found)
    return {c.width: c.relative_update for c in found}


def test_features_move_alike_at_every_width_with_the_structure_aware_rule_only() -> None:
    aware, control = updates("btt", True), updates("btt", False)
    assert spread(aware) < 1.5
    assert control[64] / control[1024] > 3


def test_mistakes() -> None:
    batch = (torch.randn(4, 48), torch.randint(10, (4,)))
    with pytest.raises(ValueError, match="layers: 'block' matches no module; the names are input, blocks"):
        el.coord_check(lambda w: ResidualMLP(48, w, 10), (8,), [batch], batch[0], lr=1, base_width=8, layers="block")
    with pytest.raises(ValueError, match=r"optimizer must be one of adamw, adam, sgd|optimizer must be one of adam"):
        el.coord_check(lambda w: ResidualMLP(48, w, 10), (8,), [batch], batch[0], lr=1, base_width=8, optimizer="lbfgs")
