"""Layers that a structure would make slower: flagged, or left dense if that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.compression import layer_timing
from einlinear.compression.layer_timing import SpeedUp, speed_up


def pretend(monkeypatch: pytest.MonkeyPatch, slow: Any, many: float = 0.83) -> list[str]:
    """Structures for which `slow` is true of their spec are slower; the specs that were timed."""
    timed = []

    def told(old: nn.Module, new: Any) -> SpeedUp:
        timed.append(new.structure.spec)
        return SpeedUp(0.48, many) if slow(new.structure.spec) else SpeedUp(1.5, 2.5)

    monkeypatch.setattr(layer_timing, "speed_up", told)
    return timed


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


DATA = [torch.randn(200, 32, generator=torch.Generator().manual_seed(0))]


def test_slower_layers_are_in_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda spec: True, many=1.2)  # for 1 token only
    report = el.compress(net(), 0.5, ["low_rank"], DATA)
    slow = [layer for layer in report.layers if layer.structure != "dense"]
    assert [layer for layer in report.layers if layer.speed_up.is_slower] == slow
    assert slow[0].speed_up == SpeedUp(0.48, 1.2)
    last = str(report).splitlines()[-1]
    assert last.startswith(
        f"{len(slow)} of 3 layers are slower than dense, for 1 token or 256: {slow[0].name} (0.48, 1.20)"
    )
    assert last.endswith("only_if_faster=True leaves such layers dense.")
    pretend(monkeypatch, lambda spec: False)
    report = el.compress(net(), 0.5, ["low_rank"], DATA)
    assert "slower" not in str(report)


def test_only_faster_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed = pretend(monkeypatch, lambda spec: spec.startswith("btt"))
    report = el.compress(net(), 0.5, ["low_rank", "btt"], DATA, only_if_faster=True)
    assert report.params <= 0.5 * report.params_before
    assert report.missed_budget is None
    assert all(not layer.structure.startswith("btt") for layer in report.layers)
    # layers of one size share what was measured: no structure is timed twice for it
    assert len(timed) <= 3 * len(set(timed))
    # all but the smallest ranks are slow, which are then taken
    pretend(monkeypatch, lambda spec: spec not in ("low_rank(rank=2)", "low_rank(rank=3)"))
    report = el.compress(net(), 0.5, ["low_rank"], DATA, only_if_faster=True)
    assert {layer.structure for layer in report.layers} <= {"low_rank(rank=2)", "low_rank(rank=3)", "dense"}
    assert report.params <= 0.5 * report.params_before


def test_the_budget_may_not_be_reached_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, lambda spec: True)
    for _ in range(2):  # the second time it goes on from what the first one found
        model = net()
        report = el.compress(model, 0.5, ["low_rank"], DATA, only_if_faster=True, folder=tmp_path)
        assert not any(isinstance(module, el.Linear) for module in model.modules())
        assert report.missed_budget == 0.5
        assert {layer.reason for layer in report.layers} == {"every structure tried is slower than the dense layer"}
        assert "The budget of 50.0% is not reached" in str(report)
    with pytest.raises(ValueError, match=r"another config \(only_if_faster\)"):
        el.compress(net(), 0.5, ["low_rank"], DATA, folder=tmp_path)


def test_what_is_measured() -> None:
    """A layer of a fiftieth of the work is faster for many tokens; one of twice the work is slower."""
    torch.manual_seed(0)
    dense = nn.Linear(1024, 1024)
    small = speed_up(dense, el.Linear(1024, 1024, "low_rank(rank=8)"))
    assert small.many_tokens > 1
    twice = speed_up(dense, nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024)))
    assert twice.is_slower
    assert max(twice.one_token, twice.many_tokens) < 1
