"""Hyperparameters at another batch size and duration; groups of an optimizer that loaded a checkpoint."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.mup import Hyperparameters

TUNED = Hyperparameters(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)


def test_batch_and_duration() -> None:
    larger = TUNED.scaled(batch=4)
    assert (larger.lr, larger.weight_decay, larger.eps) == pytest.approx((2e-3, 0.2, 5e-9))
    assert larger.betas == pytest.approx((0.6, 0.96))
    longer = TUNED.scaled(duration=4)
    assert (longer.lr, longer.weight_decay, longer.eps) == pytest.approx((5e-4, 0.05, 1e-8))
    assert longer.betas == pytest.approx((0.975, 0.9975))
    # as many steps: only the noise of gradients changes
    both = TUNED.scaled(batch=4, duration=4)
    assert (both.lr, both.weight_decay, both.eps) == pytest.approx((1e-3, 0.1, 5e-9))
    again = TUNED.scaled(batch=2).scaled(batch=2)
    assert (again.lr, *again.betas) == pytest.approx((larger.lr, *larger.betas))


def test_the_running_means_span_the_same_part_of_the_training() -> None:
    """Of a quadratic with noise, batches of any size then have one path of the mean, and one spread."""

    def spread(batch: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        h = Hyperparameters(lr=1e-3, betas=(0.98, 0.995), eps=1e-8).scaled(batch=batch)
        x = nn.Parameter(torch.ones(4000, dtype=torch.float64))
        optimizer = torch.optim.Adam([x], lr=h.lr, betas=h.betas, eps=h.eps)
        for _ in range(4000 // batch):
            noise = torch.randn(len(x), dtype=torch.float64, generator=generator)
            x.grad = x.detach() + 10 * noise / batch**0.5
            optimizer.step()
        return x.mean().item(), x.std().item()

    results = [spread(batch) for batch in (1, 4, 8)]
    for (mean, std), (other_mean, other_std) in pairwise(results):
        assert mean == pytest.approx(other_mean, abs=0.05)
        assert std == pytest.approx(other_std, rel=0.15)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="batch must be a positive number, not 0"):
        TUNED.scaled(batch=0)
    with pytest.raises(ValueError, match="duration must be a positive number, not -1"):
        TUNED.scaled(duration=-1)
    with pytest.raises(ValueError, match=r"20 leaves .* no memory: betas \(0.9, 0.99\) allow at most 10"):
        TUNED.scaled(batch=20)


def build(width: int = 64) -> nn.Module:
    return nn.Sequential(el.Linear(16, width, "btt"), nn.GELU(), el.Linear(width, width, "btt"), nn.Linear(width, 10))


def trained(model: nn.Module, **arguments: Any) -> torch.optim.AdamW:
    options: dict[str, Any] = {"lr": 1e-3, "base": None, "weight_decay": 0.1, **arguments}
    optimizer = torch.optim.AdamW(el.param_groups(model, **options))
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_groups_that_are_as_asked() -> None:
    model = build()
    groups = el.param_groups(model, 1e-3, base=None, weight_decay=0.1)
    optimizer = trained(model)
    optimizer.load_state_dict(trained(build()).state_dict())
    el.check_groups(optimizer, groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    optimizer.step()
    scheduler.step()
    el.check_groups(optimizer, groups)
    muon = el.param_groups(model, 1e-3, base=None, optimizer="muon")
    el.check_groups(el.mup.Muon(muon), muon)
    matrices = [group for group in muon if "matrix_view" in group]
    rest = [group for group in muon if "matrix_view" not in group]
    el.check_groups([el.mup.Muon(matrices), torch.optim.AdamW(rest)], muon)


def test_settings_of_the_checkpoint() -> None:
    model = build()
    optimizer = trained(model)
    optimizer.load_state_dict(trained(build(), lr=3e-3, weight_decay=0.1).state_dict())
    groups = el.param_groups(model, 1e-3, base=None, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"0.bias, .*: lr is 0.003, not 0.001"):
        el.check_groups(optimizer, groups)
    el.check_groups(optimizer, groups, ignore=["lr"])
    optimizer.load_state_dict(trained(build(), weight_decay=0.2).state_dict())
    with pytest.raises(ValueError, match=r"3.weight: weight_decay is 0.2, not 0.1"):
        el.check_groups(optimizer, groups)


def test_parameters_in_another_order() -> None:
    class Swapped(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            self.add_module(first, nn.Linear(16, 16))
            self.add_module(second, nn.Linear(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("a")(self.get_submodule("b")(x))  # type: ignore[no-any-return]

    model = Swapped("a", "b")
    optimizer = trained(model)
    optimizer.load_state_dict(trained(Swapped("b", "a")).state_dict())
    with pytest.raises(ValueError, match=r"a.weight: its state is that of b.weight; b.weight: its state is that of a"):
        el.check_groups(optimizer, el.param_groups(model, 1e-3, base=None, weight_decay=0.1))


def test_another_model() -> None:
    def dense(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(16, width), nn.Linear(width, 10))

    model = dense(64)
    optimizer = trained(model)
    optimizer.load_state_dict(trained(dense(128)).state_dict())
    groups = el.param_groups(model, 1e-3, base=None, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"0.bias.*: exp_avg has shape \(128,\), not \(64,\)"):
        el.check_groups(optimizer, groups)
    with pytest.raises(ValueError, match=r".*: the optimizer does not have it"):
        el.check_groups(optimizer, el.param_groups(dense(64), 1e-3, base=None))
    with pytest.raises(ValueError, match=r"0.weight.*: the groups do not have it"):
        el.check_groups(optimizer, [])
