"""Timings of layers: slow ones are flagged, or left dense if that is asked for; and budgets of time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tests.compression.test_narrowing import inputs, transformer
from torch import nn

import einlinear as el
from einlinear.compression import layer_timing
from einlinear.compression.layer_timing import LayerTimer, SpeedUp, _Stack, interleaved_seconds
from einlinear.compression.resume_cache import ResumeCache
from einlinear.compression.time_budget import TimeBudget
from einlinear.nn import QuantizedLinear


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, nn.Module, int], float]) -> list[str]:
    """Take the seconds of a call from a function of (label, layer, tokens); return the labels that were timed."""
    timed = []

    def fake(layers: Mapping[str, nn.Module], tokens: int, stack_bytes: int) -> dict[str, float]:
        timed.extend(layers)
        return {label: seconds(label, layer, tokens) for label, layer in layers.items()}

    monkeypatch.setattr(layer_timing, "interleaved_seconds", fake)
    return timed


def pretend_slow(monkeypatch: pytest.MonkeyPatch, slow: Callable[[str], bool], many: float = 0.8) -> list[str]:
    """Structures for which `slow` is true of their spec are slower than dense ones, which take a second."""

    def seconds(label: str, layer: nn.Module, tokens: int) -> float:
        if label == "dense":
            return 1.0
        return 1 / ((0.5 if tokens == 1 else many) if slow(label) else 2.0)

    return pretend(monkeypatch, seconds)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


DATA = [torch.randn(200, 32, generator=torch.Generator().manual_seed(0))]


def test_slower_layers_are_in_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_slow(monkeypatch, lambda spec: True, many=1.25)  # for 1 token only
    report = el.compress(net(), 0.5, ["low_rank"], DATA)
    slow = [layer for layer in report.layers if layer.structure != "dense"]
    assert [layer for layer in report.layers if layer.speed_up.is_slower] == slow
    assert slow[0].speed_up == SpeedUp({1: 0.5, 256: 1.25})
    last = str(report).splitlines()[-1]
    assert last.startswith(
        f"{len(slow)} of 3 layers are slower than dense, for 1 token or 256: {slow[0].name} (0.50, 1.25)"
    )
    assert last.endswith("only_if_faster=True leaves such layers dense.")
    pretend_slow(monkeypatch, lambda spec: False)
    report = el.compress(net(), 0.5, ["low_rank"], DATA)
    assert "slower" not in str(report)


def test_only_faster_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed = pretend_slow(monkeypatch, lambda spec: spec.startswith("btt"))
    report = el.compress(net(), 0.5, ["low_rank", "btt"], DATA, only_if_faster=True)
    assert report.params <= 0.5 * report.params_before
    assert report.missed_budget is None
    assert all(not layer.structure.startswith("btt") for layer in report.layers)
    # layers of one size share what was measured: no structure is timed twice for it
    assert len(timed) <= 2 * 2 * 3 * len(set(timed))
    # all but the smallest ranks are slow, which are then taken
    pretend_slow(monkeypatch, lambda spec: spec not in ("low_rank(rank=2)", "low_rank(rank=3)"))
    report = el.compress(net(), 0.5, ["low_rank"], DATA, only_if_faster=True)
    assert {layer.structure for layer in report.layers} <= {"low_rank(rank=2)", "low_rank(rank=3)", "dense"}
    assert report.params <= 0.5 * report.params_before


def test_the_budget_may_not_be_reached_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_slow(monkeypatch, lambda spec: True)
    for _ in range(2):  # the second time it goes on from what the first one found
        model = net()
        report = el.compress(model, 0.5, ["low_rank"], DATA, only_if_faster=True, cache_dir=tmp_path)
        assert not any(isinstance(module, el.Linear) for module in model.modules())
        assert report.missed_budget == 0.5
        assert {layer.reason for layer in report.layers} == {"every structure tried is slower than the dense layer"}
        assert "The budget of 50.0% is not reached" in str(report)
    with pytest.raises(ValueError, match=r"another config \(only_if_faster\)"):
        el.compress(net(), 0.5, ["low_rank"], DATA, cache_dir=tmp_path)


def test_slow_for_the_given_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_slow(monkeypatch, lambda spec: True, many=1.25)
    report = el.compress(net(), 0.5, ["low_rank"], DATA, only_if_faster=True, tokens=64)
    assert report.missed_budget is None
    assert {tuple(layer.speed_up.by_tokens) for layer in report.layers} == {(64,)}
    assert "x as fast, 64 tokens" in str(report)
    report = el.compress(net(), 0.5, ["low_rank(rank=4)"], DATA, only_if_faster=True, tokens=1)
    assert report.missed_budget == 0.5


def by_macs(factor: Callable[[str], float] = lambda spec: 1.0) -> Callable[[str, nn.Module, int], float]:
    """Seconds for every multiply-accumulate and call; half of it in bfloat16, and much more in other dtypes."""

    def seconds(label: str, layer: nn.Module, tokens: int) -> float:
        if isinstance(layer, el.Linear):
            return (layer.structure.macs + 100) * 1e-6 * factor(layer.structure.spec)
        dense = 1e-6 * (layer.weight.numel() + 100)
        return dense * {"dense, torch.bfloat16": 0.6, "dense, torch.float16": 9.0}.get(label, factor(label))

    return seconds


def seconds_of(model: nn.Module, seconds: Callable[[str, nn.Module, int], float]) -> float:
    layers = [layer for layer in model if isinstance(layer, el.Linear | nn.Linear)]
    return sum(seconds("dense", layer, 1) for layer in layers)


def test_layers_are_timed_when_costs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = pretend(monkeypatch, by_macs())
    layers = {name: layer for name, layer in net().named_children() if isinstance(layer, nn.Linear)}
    timer = LayerTimer(layers, (1,), ResumeCache(None, {}, ""), lambda done: None)
    budget = TimeBudget(0.5, layers, ["low_rank"], timer)
    assert not timed
    budget.measure_costs()
    count = len(timed)
    assert count >= 3 * (4 + 3)
    budget.check()
    assert budget.largest == budget.total // 2
    assert len(timed) == count


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
def test_a_budget_of_time(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    """Monarch is 20 times as slow as its MACs, so it is never chosen; even ranks are slower than interpolated."""

    def factor(spec: str) -> float:
        return 20.0 if "monarch" in spec else 1.2 if spec.endswith(("0)", "2)", "4)", "6)", "8)")) else 1.0

    seconds = by_macs(factor)
    timed = pretend(monkeypatch, seconds)
    model = net()
    before = seconds_of(model, seconds)
    report = el.compress(model, budget, ["low_rank", "monarch"], DATA, count="time", tokens=1)
    assert report.time is not None
    assert report.missed_budget is None
    assert report.time.before == pytest.approx(before, rel=1e-6)
    assert report.time.after == pytest.approx(seconds_of(model, seconds), rel=1e-6)
    assert 0.7 * budget * before < report.time.after <= budget * before
    kept = [dict(zip(report.headings, row, strict=True))["kept"] for row in report.rows()]
    assert kept[-1] == f"{report.time.after / before:.1%}"
    assert kept[0] == f"{1 / report.layers[0].speed_up.by_tokens[1]:.1%}"
    assert not any(layer.structure.startswith("monarch") for layer in report.layers)
    # 3 sizes, 4 members of 2 families, the dense layer in 3 dtypes, and then what is chosen
    assert len(timed) <= 3 * (2 * 4 + 3) + 3 * 3 * 2


@pytest.mark.parametrize("families", [["narrow"], ["narrow(uniform=True)"], ["narrow", "low_rank"]])
def test_narrow_layers_in_a_budget_of_time(monkeypatch: pytest.MonkeyPatch, families: list[str]) -> None:
    """Low rank takes three times as long as its MACs; the narrow layers that are chosen are timed themselves."""
    seconds = by_macs(lambda spec: 3.0 if spec.startswith("low_rank") else 1.0)
    timed = pretend(monkeypatch, seconds)
    model = transformer()
    report = el.compress(model, 0.6, families, inputs(), count="time", tokens=1)
    assert report.time is not None
    assert report.missed_budget is None
    narrow = [layer for layer in report.layers if layer.structure.startswith("narrow")]
    assert narrow
    assert not any(layer.structure.startswith("low_rank") for layer in report.layers)
    after = sum(1e-6 * (layer.params + 100) for layer in report.layers)
    assert report.time.after == pytest.approx(after, rel=1e-6)
    assert 0.4 < after / report.time.before <= 0.6
    assert sum(label.startswith("dense, narrowed to") for label in timed) >= 4


def test_narrow_layers_that_are_slow_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, by_macs(lambda spec: 1000.0 if "narrowed" in spec else 1.0))
    report = el.compress(transformer(), 0.6, ["narrow", "low_rank"], inputs(), count="time", tokens=1)
    assert {layer.structure.partition("(")[0] for layer in report.layers} <= {"low_rank", "dense"}
    with pytest.raises(
        ValueError, match=r"0.6 of the time of .* cannot be reached with narrow: the cheapest choice keeps 1"
    ):
        el.compress(transformer(), 0.6, ["narrow"], inputs(), count="time", tokens=1)


def test_layers_that_would_not_become_faster_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = by_macs()

    def small_are_slow(label: str, layer: nn.Module, tokens: int) -> float:
        is_middle = isinstance(layer, el.Linear) and layer.in_features == layer.out_features
        return 1.0 if is_middle else seconds(label, layer, tokens)

    pretend(monkeypatch, small_are_slow)
    report = el.compress(net(), 0.7, ["low_rank"], DATA, count="time", tokens=1)
    first, middle, last = report.layers
    assert "dense" not in (first.structure, last.structure)
    assert middle.structure == "dense"
    assert middle.reason == "every structure tried is slower than the dense layer"
    assert "Stays dense: 2, every structure tried is slower than the dense layer." in str(report)
    model = net()
    with pytest.raises(
        ValueError, match=r"0.4 of the time of 3 layers for 1 token cannot be reached with low_rank: .* 0\.54"
    ):
        el.compress(model, 0.4, ["low_rank"], DATA, count="time", tokens=1)
    assert not any(isinstance(module, el.Linear) for module in model.modules())


def test_another_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, by_macs())
    report = el.compress(net(), 0.8, ["low_rank"], DATA, count="time", tokens=4096)
    assert report.time is not None
    bfloat16, _ = report.time.alternatives
    assert 0 < bfloat16.change < report.time.change
    text = str(report)
    assert f"bfloat16 alone at this speed: expected change of the model's output {bfloat16.change:.3g}; " in text
    assert f"chosen here: {report.time.change:.3g}. Convert the model first: model.to(torch.bfloat16)." in text
    assert "float16 alone at this speed: not possible, the dense layers take 900.0%." in text
    assert f"The layers take {1e3 * report.time.after:.3g} of 8.49 ms for 4,096 tokens: " in text
    report = el.compress(net(), 0.5, ["low_rank"], DATA, count="time", tokens=4096)
    assert "bfloat16 alone at this speed: not possible, the dense layers take 60.0%." in str(report)


def test_a_budget_of_time_resumes_with_the_same_timings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"count": "time", "tokens": 1, "cache_dir": tmp_path}
    pretend(monkeypatch, by_macs())
    first = el.compress(net(), 0.5, ["low_rank", "btt"], DATA, **options)
    timed = pretend(monkeypatch, by_macs(lambda spec: 3.0))
    assert el.compress(net(), 0.5, ["low_rank", "btt"], DATA, **options) == first
    assert timed == []
    with pytest.raises(ValueError, match=r"another config \(tokens\)"):
        el.compress(net(), 0.5, ["low_rank", "btt"], DATA, **options | {"tokens": 2})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(None, "count='time' needs tokens: the number in one call"), (0, "at least 1, not 0"), (1.5, "not 1.5")],
)
def test_wrong_tokens(tokens: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        el.compress(net(), 0.5, ["low_rank"], DATA, count="time", tokens=tokens)


def test_what_is_measured() -> None:
    """A layer of a fiftieth of the work is faster for many tokens; one of twice the work is slower."""
    torch.manual_seed(0)
    dense = nn.Linear(1024, 1024)
    small = el.Linear(1024, 1024, "low_rank(rank=8)")
    wide = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024))
    before = copy.deepcopy(small.state_dict())
    seconds = interleaved_seconds({"dense": dense, "small": small, "wide": wide}, 256, stack_bytes=2**23)
    assert 0 < seconds["small"] < seconds["dense"] < seconds["wide"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_a_much_slower_layer_is_called_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def seconds(layer: nn.Linear, x: torch.Tensor) -> float:
        called.append(layer.out_features)
        return {8: 1e-4, 16: 5e-4, 24: 3e-4}[layer.out_features]

    monkeypatch.setattr(layer_timing, "_seconds_of_call", seconds)
    layers = {str(n): nn.Linear(8, n) for n in (8, 16, 24)}
    assert interleaved_seconds(layers, 1, 0) == {"8": 1e-4, "16": 5e-4, "24": 3e-4}
    assert [called.count(n) for n in (8, 16, 24)] == [60, 3, 60]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_call_takes_other_memory(dtype: torch.dtype) -> None:
    """Until the stack ends; its entries are ordinary numbers in every dtype, so that none is slow to compute with."""
    layer = nn.Linear(32, 16, dtype=dtype)
    stack, places = _Stack(4 * 64 * 33, torch.device("cpu")), []
    for _ in range(9):
        stack.advance(layer)
        places.append((layer.weight.data_ptr(), layer.bias.data_ptr()))
        assert layer.weight.shape == (16, 32)
        assert 1e-3 < layer.weight.abs().min() <= layer.weight.abs().max() < 2
    count = len({weight for weight, _ in places})
    assert count == (4 if dtype == torch.float32 else 7)
    assert places[count] == places[0]
    assert len({*sum(places[:count], ())}) == 2 * count
    large = nn.Linear(1024, 1024)
    at = large.weight.data_ptr()
    stack.advance(large)
    assert large.weight.data_ptr() == at


def test_quantized_weights_are_timed() -> None:
    layers = {"dense": nn.Linear(64, 64, bias=False)}
    layers |= {p: QuantizedLinear(64, 64, "dense", False, precision=p) for p in ("bfloat16", "int4(group=64)")}
    assert all(seconds > 0 for seconds in interleaved_seconds(layers, 2, 2**16).values())
