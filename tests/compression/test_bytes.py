"""A budget of bytes: structure and precision are chosen together, and quantisation alone is one of the choices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.layer_timing import SpeedUp
from einlinear.nn.quantized_linear import QuantizedLinear


def model_and_data(rank: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    """A model, whose weights may be of low rank, and data whose features are correlated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    if rank is not None:
        for layer in (model[0], model[2]):
            layer.weight.data = torch.randn(layer.out_features, rank) @ torch.randn(rank, layer.in_features) / 8
    mix = torch.randn(64, 64) * torch.logspace(0, -2, 64)[:, None]
    return model.to(dtype), [(torch.randn(256, 64) @ mix).to(dtype) for _ in range(4)]


def stored(model: nn.Module) -> int:
    """The bytes of a model without the biases."""
    return sum(t.nbytes for name, t in model.state_dict().items() if "bias" not in name)


@torch.no_grad()
def change(model: nn.Module, original: nn.Module, data: list[Tensor]) -> float:
    expected, y = original(data[0]).float(), model(data[0]).float()
    return float((y - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("budget", [0.6, 0.25, 0.14, 0.07])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_budget_holds_for_the_stored_tensors(budget: float, sequential: bool) -> None:
    model, data = model_and_data()
    original, before = copy.deepcopy(model), stored(model)
    report = el.compress(model, budget, ["low_rank", "monarch"], data, count="bytes", sequential=sequential)
    assert report.bytes_before == before
    assert report.bytes == stored(model) <= budget * before
    assert 0 < change(model, original, data) < {0.6: 1e-5, 0.25: 1e-3, 0.14: 0.03, 0.07: 0.4}[budget]


def test_more_bytes_are_better() -> None:
    original, data = model_and_data()
    changes = []
    for budget in (0.5, 0.25, 0.125, 0.07):
        model = copy.deepcopy(original)
        report = el.compress(model, budget, ["low_rank"], data, count="bytes")
        assert report.alternative is not None
        changes.append(change(model, original, data))
        if report.alternative.quantized is not None:
            assert report.alternative.chosen <= report.alternative.quantized * 1.0001
    assert changes == sorted(changes)


def test_weights_of_full_rank_are_only_rounded() -> None:
    model, data = model_and_data()
    data = [torch.randn(512, 64) for _ in range(4)]
    report = el.compress(model, 0.25 + 0.02, ["low_rank"], data, count="bytes")
    assert {layer.structure for layer in report.layers} == {"dense"}
    assert any(layer.precision == "int8" for layer in report.layers)
    assert report.alternative is not None
    assert report.alternative.quantized == pytest.approx(report.alternative.chosen)


def test_weights_of_low_rank_are_structured_and_rounded() -> None:
    model, data = model_and_data(rank=6)
    original = copy.deepcopy(model)
    report = el.compress(model, 0.06, ["low_rank"], data, count="bytes")
    assert all(layer.structure.startswith("low_rank") and layer.precision for layer in report.layers)
    assert change(model, original, data) < 0.02
    text = str(report)
    assert f"The weights take {report.bytes:,} of 65,536 bytes" in text
    assert "Quantisation alone at these bytes: not possible; chosen here" in text
    assert f"{report.layers[0].structure}, {report.layers[0].precision}" in text


def test_the_report_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_and_data()
    monkeypatch.setattr(SpeedUp, "is_slower", True)
    report = el.compress(model, 0.25, ["dense"], data, count="bytes")
    first, everything = (dict(zip(report.headings, row, strict=True)) for row in (report.rows()[0], report.rows()[-1]))
    assert first["bytes"] == f"{report.layers[0].bytes:,}"
    assert everything["bytes"] == f"{stored(model):,}"
    assert everything["kept"] == f"{stored(model) / 65536:.1%}"
    assert "of its parameters" not in str(report)
    assert str(report).endswith(
        "Calls with gradients, under tracing or off the CPU expand quantised weights: el.explain(layer, x) says why."
    )


@pytest.mark.parametrize("count", ["params", "macs"])
def test_other_reports_have_no_column_of_bytes(count: str) -> None:
    model, data = model_and_data()
    report = el.compress(model, 0.5, ["low_rank"], data, count=count)
    everything = dict(zip(report.headings, report.rows()[-1], strict=True))
    assert everything["kept"] == f"{getattr(report, count) / 16384:.1%}"
    assert "bytes" not in everything
    assert f"The whole model keeps {(report.params + 128) / (16384 + 128):.1%} of its parameters." in report.notes


def test_the_budget_is_over_the_models_own_dtype() -> None:
    model, data = model_and_data(dtype=torch.bfloat16)
    report = el.compress(model, 0.55, ["low_rank"], data, count="bytes")
    assert report.bytes_before == 2 * 2 * 64 * 128
    assert {layer.precision for layer in report.layers} == {"int8"}
    assert model(data[0]).dtype == torch.bfloat16


def test_it_resumes(tmp_path: Path) -> None:
    original, data = model_and_data()
    outputs = []
    for _ in range(2):
        model = copy.deepcopy(original)
        report = el.compress(model, 0.1, ["low_rank"], data, count="bytes", cache_dir=tmp_path / "cache")
        outputs.append(model(data[0]))
    assert torch.equal(*outputs)
    assert any(isinstance(layer, QuantizedLinear) for layer in model)
    assert report.bytes == stored(model)


def test_without_calibration_weights_are_rounded_to_nearest() -> None:
    model, data = model_and_data()
    original = copy.deepcopy(model)
    el.compress(model, 0.3, ["low_rank"], count="bytes")
    assert change(model, original, data) < 1e-3


def test_impossible_requests_raise(tmp_path: Path) -> None:
    model, data = model_and_data()
    with pytest.raises(
        ValueError, match=r"0\.001 of the 65,536 bytes of 2 layers cannot be reached with low_rank: .* 0\.0"
    ):
        el.compress(model, 0.001, ["low_rank"], data, count="bytes", cache_dir=tmp_path / "cache")
    # another budget may use the same folder
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"only_if_faster=True needs .*: with 'bytes' the choice ignores speed"):
        el.compress(model, 0.5, ["low_rank"], data, count="bytes", only_if_faster=True)


def test_without_structures_weights_are_only_rounded() -> None:
    model, data = model_and_data(rank=6)
    report = el.compress(model, 0.1, ["dense"], data, count="bytes")
    assert report.bytes == stored(model) <= 0.1 * report.bytes_before
    assert {layer.structure for layer in report.layers} == {"dense"}
    assert {layer.precision for layer in report.layers} <= {"int2(group=64)", "int3(group=64)", "int4(group=64)"}
    assert report.alternative is not None
    assert report.alternative.quantized == pytest.approx(report.alternative.chosen)
