"""Cold weights: every call takes another copy of them, and plain reads are timed beside the calls."""

from __future__ import annotations

import pytest
import torch

from einlinear_lab.bench import cold, run, tables, timing
from einlinear_lab.bench.cases import BenchConfig, Case
from einlinear_lab.bench.cold import Stack, interleave_cold
from einlinear_lab.bench.machine import Roofline, measure_roofline
from einlinear_lab.bench.variants import DENSE, OURS, make_variants, make_workload

CASE = Case("btt", 16, 16, 2, "decode", "bfloat16", cold=True)


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "LEAST", 20_000)
    monkeypatch.setattr(cold, "_cache_bytes", lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_has_copies_in_turn(dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 5), (7,))]
    values = [w.detach().clone() for w in weights]
    stack = Stack(weights, 1000)
    assert 1000 <= stack.memory.nbytes <= 1200
    places = []
    for _ in range(2 * len(stack.memory)):
        stack.advance()
        places.append(tuple(w.data_ptr() for w in weights))
        assert all(place % 64 == 0 for place in places[-1])
        assert all(torch.equal(w, value) for w, value in zip(weights, values, strict=True))
    half = len(stack.memory)
    assert len({*places}) == half
    assert places[:half] == places[half:]


def test_every_call_has_weights_that_no_call_used_before() -> None:
    p = make_workload(CASE)
    found = [p.dense, *make_variants(p, ("reference",))[0]]
    used: dict[str, list[int]] = {variant.name: [] for variant in found}
    calls = {v.name: lambda v=v: used[v.name].append(v.weights[0].data_ptr()) for v in found}
    times = interleave_cold(calls, found, budget=0)
    assert times.seconds.keys() == used.keys()
    assert len(times.reads) == len(times.seconds[OURS]) == 5
    # the layer and the reference share factors, but not copies of these
    assert len({*used[OURS], *used["reference"]}) == 10
    assert all(len({*places}) == 5 for places in used.values())
    assert times.stack_bytes >= 20_000
    assert times.piece_bytes == times.stack_bytes // 4 // 32 * 4


def test_reads_take_other_memory_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_workload(CASE)
    (ours, _), _ = make_variants(p, ())
    places: list[int] = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: places.append(tensor.data_ptr()))
    monkeypatch.setattr(timing, "MIN_RUNS", cold._PIECES)
    interleave_cold({ours.name: lambda: places.append(ours.weights[0].data_ptr())}, [ours], budget=0)
    assert len({*places}) == len(places) == 2 * cold._PIECES


def test_stacks_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "LEAST", 2**60)
    monkeypatch.setattr(cold, "_available_bytes", lambda: 100_000)
    p = make_workload(CASE)
    found = make_variants(p, ())[0]
    times = interleave_cold({v.name: lambda: None for v in found}, found, budget=0)
    # half of the memory for the factors, those of the copying baseline, and plain reads
    assert 15_000 < times.stack_bytes < 18_000


def test_a_result_has_the_bandwidth_of_its_weights() -> None:
    result = run.measure(CASE, BenchConfig(budget=0, backends=()), Roofline(1e11, 1e10))
    ours, dense = result.of(OURS), result.of(DENSE)
    assert ours is not None
    assert dense is not None
    assert result.weight_bandwidth() == pytest.approx(2 * 128 / ours.seconds.median)
    assert result.weight_bandwidth(DENSE) == pytest.approx(2 * 256 / dense.seconds.median)
    assert result.read_fraction() == pytest.approx(2 * 128 / ours.seconds.median / result.read_bandwidth)
    (table,) = tables.summary([result])
    assert table.title == "decode from cold weights, bfloat16 on cpu"
    row = dict(zip(table.headings, table.rows[0], strict=True))
    assert row["weight GB/s"] == tables.number(2 * 128 / ours.seconds.median / 1e9)
    assert row["of read"] == tables.number(result.read_fraction())
    warm = run.measure(Case("btt", 16, 16, 2, "decode"), BenchConfig(budget=0, backends=()), Roofline(1e11, 1e10))
    assert (warm.read_bandwidth, warm.read_fraction(), warm.stack_bytes) == (None, None, None)


def test_small_matmuls_measure_slow_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without fast half precision would take minutes for the largest one."""
    sizes = []

    def slow(n: int, dtype: str, device: str) -> float:
        sizes.append(n)
        return 1e9

    monkeypatch.setattr("einlinear_lab.bench.machine._matmul_speed", slow)
    measure_roofline("bfloat16", "cpu")
    assert sizes == [256]
    monkeypatch.setattr("einlinear_lab.bench.machine._matmul_speed", lambda n, *_: sizes.append(n) or 1e12)
    measure_roofline("bfloat16", "cpu")
    assert sizes == [256, 256, 512, 1024, 2048]
