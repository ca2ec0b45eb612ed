"""Feed-forward blocks: dense, layer by layer and fused, checked before they are timed; ratios, tables, claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.bench.made_up import made_up
from tests.lab.cli.command import assert_refused, run
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear_lab.bench import fit_costs, plot, results, tables
from einlinear_lab.bench.cases import DTYPES, SUITES, BenchConfig, Case, choose, estimate_traffic
from einlinear_lab.bench.claims import CLAIMS, judge
from einlinear_lab.bench.machine import Roofline, this_machine
from einlinear_lab.bench.results import Bench
from einlinear_lab.bench.run import Reference, measure
from einlinear_lab.bench.variants import (
    BLOCK,
    COPYING,
    DENSE,
    FUSED,
    OURS,
    Variant,
    make_block,
    make_variants,
    make_workload,
)

FAST, ROOF = BenchConfig(budget=0, backends=()), Roofline(1e11, 1e10)
SPECS = ("btt", "btt(rank=2)", "monarch(blocks=4)", "low_rank(rank=8)", "dyad", "kronecker")
needs_kernel = pytest.mark.skipif(
    ops.reason_unsupported("cpu", el.structure("btt", 64, 64), torch.float32, torch.device("cpu")) is not None,
    reason="needs a C++ compiler",
)


def block(
    mode: str = "train", spec: str = "btt", sizes: tuple[int, int] = (64, 128), tokens: int = 96, **options: Any
) -> Case:
    return Case(spec, *sizes, tokens, mode, **{"activation": "gelu", **options})


# Cases


def test_macs_and_size_of_a_block() -> None:
    plain, gated = block(), block(activation="silu", gated=True)
    up, down = el.structure("btt", 64, 128), el.structure("btt", 128, 64)
    assert (plain.build(), gated.build()) == ((up, down), (up, up, down))
    assert (plain.dense_macs, gated.dense_macs) == (2 * 64 * 128, 3 * 64 * 128)
    assert str(plain) == "btt, 64 → 128 → 64, gelu, 96 tokens, train, float32"
    assert str(gated) == "btt, 64 → 128 → 64, gated silu, 96 tokens, train, float32"
    assert Case("btt", 64, 128, 96, "train").dense_macs == 64 * 128


def test_the_suite_has_what_a_block_can_be() -> None:
    cases = SUITES["blocks"].cases()
    assert len(cases) == len({*cases}) == 4 * 3 * 2 * 2 * 2 * 2
    assert {(case.activation, case.gated) for case in cases} == {("gelu", False), ("silu", True)}
    assert {case.size for case in cases} == {f"{d} → {4 * d} → {d}" for d in (512, 1024, 2048)}
    assert {case.mode for case in cases} == {"forward", "train"}
    assert {case.structure for case in cases if case.in_features == 512} == {
        *("btt", "btt(rank=2)", "monarch(blocks=16)", "low_rank(rank=64)")
    }
    assert not any(case.activation for case in SUITES["standard"].cases())


def test_structures_must_exist_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(el.structures.families.FAMILIES))

    def narrowing(in_features: int, out_features: int) -> str:
        if out_features > in_features:
            raise el.structures.DoesNotFit("it only narrows")
        return "i, o i -> o"

    el.register_family("narrowing", narrowing)
    assert choose("quick", structures=("narrowing",), sizes=((64, 32),)).cases()
    with pytest.raises(ValueError, match="it only narrows"):
        choose("blocks", structures=("narrowing",), sizes=((64, 32), (32, 64))).cases()


def test_traffic_counts_hidden_features() -> None:
    up, down = el.structure("btt", 64, 256), el.structure("btt", 256, 64)
    between = sum(term.intermediate_size for s in (up, down) for term in s.terms)
    params = up.params + down.params
    forward = estimate_traffic(block("forward", sizes=(64, 256), tokens=10), up, down)
    assert forward.intermediates == 4 * 10 * (between + 256)
    assert forward.least == 4 * (10 * 64 + 10 * 64 + params)
    assert forward.total == forward.least + 2 * forward.intermediates
    gated = estimate_traffic(block("train", sizes=(64, 256), tokens=10, dtype="bfloat16"), up, up, down)
    assert gated.intermediates == 2 * 10 * (between + sum(term.intermediate_size for term in up.terms) + 2 * 256)
    assert gated.least == 2 * (3 * 10 * 64 + 2 * 10 * 64 + 3 * (params + up.params))


# Checks


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_right_passes(spec: str, dtype: str) -> None:
    for sizes, tokens, mode, activation, gated, bias in (
        ((64, 256), 96, "train", "gelu", False, True),
        ((60, 47), 33, "train", "silu", True, True),
        ((47, 60), 257, "train", "relu_squared", False, False),
        ((64, 128), 1, "decode", "tanh", True, False),
    ):
        p = make_workload(Case(spec, *sizes, tokens, mode, dtype, bias=bias, activation=activation, gated=gated))
        found, refused = make_variants(p)
        assert not refused
        with p.differentiating():
            reference = Reference(p)
            complaints = {variant.name: reference.complaint(variant) for variant in found}
        assert complaints == {OURS: None, BLOCK: None, FUSED: None}


@needs_kernel
def test_the_fused_block_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few its tokens; one after the other it never is."""
    calls: list[str] = []
    feed_forward, linear = ops.feed_forward, ops.linear
    monkeypatch.setattr(ops, "feed_forward", lambda *args: (calls.append("block"), feed_forward(*args))[1])
    p = make_workload(block("decode", tokens=2))
    by_name = {variant.name: variant for variant in make_variants(p)[0]}
    with torch.no_grad():
        by_name[FUSED].forward(p.x)
        assert calls == ["block"]
        by_name[OURS].forward(p.x)
    assert calls == ["block"]
    assert linear is ops.linear


class _Wrong(torch.autograd.Function):
    """The identity, whose gradient is off by one per cent."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


@pytest.mark.parametrize("index", range(6))
def test_a_wrong_gradient_of_any_factor_is_found(index: int) -> None:
    p = make_workload(block(activation="silu", gated=True, bias=True))
    factors = p.factors
    assert len(factors) == 6

    def forward(x: Tensor) -> Tensor:
        used = [_Wrong.apply(factor) if i == index else factor for i, factor in enumerate(factors)]
        weights = [
            ops.Weights(layer.structure, used[2 * i : 2 * i + 2], layer.bias) for i, layer in enumerate(p.layers)
        ]
        return ops.feed_forward(x, weights[0], weights[2], weights[1], "silu")

    complaint = Reference(p).complaint(Variant("wrong", factors, forward))
    assert f"gradient of weight {index + 1} is off" in str(complaint)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p, x: p.layers[2](torch.sigmoid(p.layers[1](x)) * p.layers[0](x)), "output is off"),
        (lambda p, x: p.layers[2](ops.ACTIVATIONS["silu"](p.layers[0](x)) * p.layers[1](x)), "output is off"),
        (lambda p, x: p.through(p.layers, x.detach() + 0 * x), "gradient of the input is off"),
        (lambda p, x: _wrong_bias(p, x), "gradient of the bias is off"),
    ],
)
def test_what_is_wrong_does_not_pass(change: Callable[[Any, Tensor], Tensor], complaint: str) -> None:
    p = make_workload(block(activation="silu", gated=True, bias=True))
    assert complaint in str(Reference(p).complaint(Variant("wrong", p.factors, lambda x: change(p, x))))


def _wrong_bias(p: Any, x: Tensor) -> Tensor:
    up, gate, down = p.layers
    weights = [
        ops.Weights(layer.structure, layer.factors(), bias)
        for layer, bias in ((up, up.bias), (gate, _Wrong.apply(gate.bias)), (down, down.bias))
    ]
    return ops.feed_forward(x, weights[0], weights[2], weights[1], "silu")


# Measurements


@needs_kernel
@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True)])
def test_a_block_is_measured_and_its_file_read_again(activation: str, gated: bool, tmp_path: Path) -> None:
    cases = [block(mode, activation=activation, gated=gated, tokens=40) for mode in ("forward", "train")]
    found = tuple(measure(case, FAST, ROOF) for case in cases)
    for result in found:
        assert [m.name for m in result.measurements] == [DENSE, OURS, BLOCK, FUSED]
        assert result.macs == sum(s.macs for s in result.case.build())
        assert result.limit == result.case.dense_macs / result.macs
        for name in (BLOCK, FUSED):
            m = result.of(name)
            assert m is not None
            assert m.speedup is not None
            assert m.over_layers is not None
            assert m.over_copying is None
        assert result.of(OURS).over_layers is None  # type: ignore[union-attr]
        assert all((m.peak_bytes is not None) == (result.case.mode == "train") for m in result.measurements)
    training = found[1]
    memory = training.memory_over_layers(FUSED)
    assert memory is not None
    assert memory < 0.8
    bench = Bench(this_machine("cpu"), FAST, results=found)
    results.write(bench, tmp_path / "bench.json")
    again = results.read(tmp_path / "bench.json")
    assert [result.case for result in again.results] == cases
    changes = results.compare(bench, again.results)
    assert [(change.case.mode, change.name) for change in changes] == [
        (mode, name) for mode in ("forward", "train") for name in (OURS, BLOCK, FUSED)
    ]
    assert all(change.ratio == pytest.approx(1, rel=1e-4) for change in changes)


@needs_kernel
def test_the_result_says_whether_users_get_the_fused_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(block("forward"), FAST, ROOF).backend == FUSED
    monkeypatch.setattr(el.FeedForward, "reason_not_to_fuse", lambda self, x: "it is slower")
    assert measure(block("forward"), FAST, ROOF).backend == "layer by layer"


def test_without_the_kernel_a_block_is_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_workload(block("forward"))
    monkeypatch.setattr(el.FeedForward, "reason_not_to_fuse", lambda self, x: "no compiler")
    found, refused = make_variants(p)
    assert [variant.name for variant in found] == [OURS, BLOCK]
    assert refused == {FUSED: "no compiler"}
    assert list(make_block(p).parameters()) == [*p.factors, *p.biases]


def test_ratios_and_tables() -> None:
    case = block("train", sizes=(512, 2048), tokens=2048)
    peaks = {DENSE: 50_000_000, OURS: 40_000_000, BLOCK: 10_000_000}
    result = made_up(case, peaks, **{BLOCK: 0.1, FUSED: 0.08, OURS: 0.4})
    assert result.fraction() == pytest.approx(10 / result.limit)
    assert result.memory_over_layers(BLOCK) == 0.25
    (table,) = tables.summary([result])
    assert table.title == "blocks, train, float32 on cpu"
    row = dict(zip(table.headings, table.rows[0], strict=True))
    assert row["in → out"] == "512 → 2048 → 512, gelu"
    assert row["MACs"] == f"{result.macs:,}"
    assert (row[f"{DENSE} ms"], row[f"{OURS} ms"], row[f"{BLOCK} ms"]) == ("1,000 ±5%", "400 ±5%", "100 ±5%")
    assert (row["× nn.Linear"], row["× el.Linear"], row["limit"]) == ("10", "4", "21.3")
    assert row["fraction"] == tables.number(10 / result.limit)
    assert (row["peak × el.Linear"], row["peak MB"]) == ("0.25", "10 / 50 / 40")
    assert row["backend"] == "fused"
    assert row["remarks"] == ""
    slow = made_up(case, **{BLOCK: 0.5, FUSED: 0.3, OURS: 0.4})
    layers = Bench(this_machine("cpu"), FAST, results=(slow,)).results[0]
    assert tables.summary([layers])[0].rows[0][-1] == "el.Linear is faster"
    (detail,) = tables.details([result])
    assert [row[3] for row in detail.rows] == [DENSE, OURS, BLOCK, FUSED]
    layer = made_up(Case("btt", 512, 512, 2048, "train"), el_Linear=0.1)
    assert [table.title for table in tables.summary([result, layer])] == [
        "train, float32 on cpu",
        "blocks, train, float32 on cpu",
    ]


def test_claims_about_layers_are_not_those_about_blocks() -> None:
    case = block("train", sizes=(1024, 4096), tokens=2048)
    result = made_up(case, {DENSE: 10, OURS: 10, BLOCK: 20}, **{BLOCK: 0.5, OURS: 0.4})
    verdicts = [verdict for verdict in judge([result]) if verdict.values]
    assert [(verdict.claim.text.split(":")[0], verdict.summary) for verdict in verdicts] == [
        ("blocks", "missed by 20%"),
        ("blocks, training", "missed by 50%"),
    ]
    layer = made_up(Case("btt", 1024, 4096, 2048, "train"), el_Linear=0.4)
    assert not any("block" in verdict.claim.text for verdict in judge([layer]) if verdict.values)
    assert all(any("block" in claim.text for claim in claims) for claims in CLAIMS.values())


def test_blocks_do_not_fit_the_costs_of_layers() -> None:
    layer = made_up(Case("btt", 64, 64, 32, "forward"), cpu=0.1)
    bench = Bench(this_machine("cpu"), FAST, results=(made_up(block()), layer))
    assert [case for case, *_ in fit_costs.timings([bench])] == [layer.case]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [made_up(block(mode, sizes=(64, d)), **{BLOCK: 0.1}) for mode in ("forward", "train") for d in (128, 256)]
    plot.draw(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@needs_kernel
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear_lab.bench.run.measure_roofline", lambda *_: ROOF)
    tiny = ("bench", "--suite", "blocks", "--structures", "btt", "--sizes", "32x64", "--tokens", 40, "--budget", 0)
    tiny = (*tiny, "--dtype", "float32", "--passes", "forward", "--out", tmp_path / "out")
    code, out, err = run(*tiny)
    assert (code, err) == (0, "")
    assert "2 of 2 cases to measure" in out
    assert "32 → 64 → 32, gated silu" in out
    assert "el.FeedForward ms" in (tmp_path / "out" / "bench.md").read_text()
    assert "has all cases already" in run(*tiny)[1]
    code, out, _ = run("bench", "--compare", tmp_path / "out", "--out", tmp_path / "new")
    assert code == 0
    assert "Changes of the speed-up over nn.Linear" in out
    assert {result.case for result in results.read(tmp_path / "new" / "bench.json").results} == {
        result.case for result in results.read(tmp_path / "out" / "bench.json").results
    }
    assert_refused(run(*tiny, "--backends", "cpu"), "--backends has no meaning for --suite blocks")
    assert_refused(run(*tiny, "--compile"), "--compile has no meaning for --suite blocks")


def test_all_variants_share_matrices() -> None:
    p = make_workload(block(activation="silu", gated=True, bias=True, dtype="bfloat16"))
    for layer, dense in zip(p.layers, p.dense_layers, strict=True):
        assert dense.bias is layer.bias
        torch.testing.assert_close(dense.weight, layer.dense_weight(), rtol=0.01, atol=0.01)
        assert dense.weight.dtype == DTYPES["bfloat16"]
    assert COPYING not in {variant.name for variant in make_variants(p)[0]}
