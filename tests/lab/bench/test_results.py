"""What is kept, judged and compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.lab.bench.made_up import made_up

from einlinear_lab.bench import results, run, tables
from einlinear_lab.bench.cases import BenchConfig, Case
from einlinear_lab.bench.claims import judge
from einlinear_lab.bench.machine import Roofline, this_machine
from einlinear_lab.bench.results import Bench, BenchResult, Measurement, Session, compare
from einlinear_lab.bench.run import Recorder
from einlinear_lab.bench.variants import COPYING, DENSE, OURS, RECOMPUTING

CASES = [Case("btt", 64, 64, 32, mode) for mode in ("forward", "train")]
FAST = BenchConfig(budget=0)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, CASES, FAST, "einlinear bench")
    for case in CASES:
        recorder.measure(case)
    wrong = Measurement("batched", "it is wrong", wrong=True)
    odd = dataclasses.replace(
        recorder.results[0], measurements=(wrong,), case=Case("btt", 64, 32, 1, "decode", bias=True)
    )
    bench = dataclasses.replace(recorder.bench, results=(*recorder.bench.results, odd))
    path = tmp_path / "again.json"
    results.write(bench, path)
    again = results.read(path)
    results.write(again, path)
    assert results.read(path) == again
    assert again.machine == bench.machine
    assert again.config == bench.config
    assert again.results[2] == odd
    for old, new in zip(bench.results, again.results, strict=True):
        assert (old.case, old.macs, old.traffic, old.backend) == (new.case, new.macs, new.traffic, new.backend)
        for before, after in zip(old.measurements, new.measurements, strict=True):
            assert (before.name, before.runs, before.peak_bytes) == (after.name, after.runs, after.peak_bytes)
            assert (before.seconds is None) == (after.seconds is None)
            if before.seconds and after.seconds:
                assert after.seconds.median == pytest.approx(before.seconds.median, rel=1e-5)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Case] = []

    def counting(case: Case, config: BenchConfig, roofline: Roofline) -> BenchResult:
        measured.append(case)
        return made_up(case, el_Linear=0.2)

    monkeypatch.setattr(run, "measure", counting)
    recorder = Recorder(tmp_path, CASES, FAST, "first")
    assert recorder.missing == CASES
    assert recorder.estimate() > 0
    recorder.measure(CASES[0])

    again = Recorder(tmp_path, CASES, FAST, "second")
    assert again.missing == CASES[1:]
    again.measure(CASES[1])
    assert [result.case for result in again.results] == CASES
    assert measured == CASES
    assert [session.command for session in results.read(again.path).sessions] == ["first", "second"]

    fresh = Recorder(tmp_path, CASES, FAST, fresh=True)
    assert fresh.missing == CASES


def test_cases_too_slow_for_the_budget_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_roofline", lambda dtype, _: Roofline(1e4 if dtype == "float16" else 1e11, 1e10))
    cases = [*CASES, dataclasses.replace(CASES[0], dtype="float16")]
    recorder = Recorder(tmp_path, cases, FAST)
    assert (recorder.missing, recorder.too_slow) == (cases[:2], cases[2:])
    assert recorder.estimate() < recorder.limit == 20
    assert Recorder(tmp_path, cases, BenchConfig(budget=10)).missing == cases


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"cpu": "abacus"}, "cpu was 'abacus'"), ({"torch": "0.4.0"}, "torch was '0.4.0'"), ({"code": "f00"}, "code was")],
)
def test_a_file_of_another_machine_or_version_is_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    machine = dataclasses.replace(this_machine("cpu"), **changed)
    results.write(Bench(machine, FAST, results=(made_up(CASES[0], el_Linear=0.2),)), tmp_path / run.FILE)
    with pytest.raises(ValueError, match=f"{message}.*--out.*--fresh"):
        Recorder(tmp_path, CASES, FAST)
    with pytest.raises(ValueError, match=message):
        Recorder(tmp_path, CASES, FAST, reading=True)  # it lacks a case, which would be measured here
    assert Recorder(tmp_path, CASES[:1], FAST, reading=True).missing == []
    assert Recorder(tmp_path, CASES, FAST, fresh=True).missing == CASES


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    results.write(Bench(this_machine("cpu"), BenchConfig(budget=2)), tmp_path / run.FILE)
    with pytest.raises(ValueError, match="budget was 2, now 0"):
        Recorder(tmp_path, CASES, FAST)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1, "machine": {}}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / run.FILE).write_text(text)
    with pytest.raises(ValueError, match="no measurements that can be read"):
        Recorder(tmp_path, CASES, FAST)


def test_what_cannot_run_here_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        Recorder(tmp_path, [dataclasses.replace(CASES[0], device="cuda")], FAST)
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        Recorder(tmp_path, CASES, BenchConfig(backends=("abacus",)))


def test_ratios_of_a_result() -> None:
    result = made_up(Case("btt", 1024, 1024, 2048, "forward"), el_Linear=0.1)
    assert result.limit == 16
    assert result.fraction() == pytest.approx(10 / 16)
    assert result.roofline_fraction() == pytest.approx(0.01 / 0.1)
    assert result.bandwidth() == pytest.approx(result.traffic.total / 0.1)
    assert not result.dense_wins
    assert made_up(result.case, el_Linear=1.2).dense_wins
    assert not made_up(result.case, el_Linear=1.02).dense_wins  # within the spread


def test_claims() -> None:
    forward, train = (Case("btt", 1024, 1024, 2048, mode) for mode in ("forward", "train"))
    fast = made_up(forward, el_Linear=0.1)
    slow = made_up(dataclasses.replace(forward, out_features=4096), el_Linear=0.6)
    hungry = made_up(train, {DENSE: 10**7, OURS: 10**8, RECOMPUTING: 10**7}, el_Linear=0.1, **{RECOMPUTING: 0.1})
    verdicts = {verdict.claim.text: verdict for verdict in judge([fast, slow, hungry])}

    limit = verdicts["forward, 2048 tokens, d ≥ 1024: at least 0.55 of the MAC limit"]
    assert [result for result, _ in limit.missed] == [slow]
    assert limit.summary == f"missed by {1 - 1 / 0.6 / slow.limit / 0.55:.0%}"
    assert (
        verdicts["never slower than nn.Linear where MACs are at most a quarter of dense and d ≥ 1024"].summary
        == "passed"
    )
    assert [r for r, _ in verdicts["never slower than the copying baseline"].missed] == [slow]
    assert verdicts["forward, btt, 2048 tokens, d ≥ 1024: at least 2.5 × the copying baseline"].missed[0][0] == slow
    memory = verdicts["training: peak memory at most that of nn.Linear plus the intermediates"]
    assert [r for r, _ in memory.missed] == [hungry]
    assert verdicts["training, recomputing: peak memory at most that of nn.Linear"].summary == "passed"
    assert verdicts["decode, btt, d = 4096: at least 8 × nn.Linear"].summary == "not measured"


def test_changes_beyond_the_spread_are_marked() -> None:
    before = Bench(this_machine("cpu"), FAST, results=tuple(made_up(case, el_Linear=0.2) for case in CASES))
    now = [made_up(CASES[0], el_Linear=0.3), made_up(CASES[1], el_Linear=0.205)]
    found = {(change.case, change.name): change for change in compare(before, now)}
    worse, same = (found[case, OURS] for case in CASES)
    assert worse.beyond_spread
    assert worse.ratio == pytest.approx(2 / 3)
    assert not same.beyond_spread
    assert not found[CASES[0], COPYING].beyond_spread
    rows = {(row[3], row[4]): row[-1] for row in tables.changed(found.values()).rows}
    assert rows["forward", OURS] == "slower"
    assert rows["train", OURS] == "within the spread"


def test_tables_and_page() -> None:
    case = Case("btt", 1024, 1024, 2048, "forward")
    wrong = Measurement("batched", "the output is off", wrong=True)
    absent = Measurement("triton", "it runs on GPUs")
    result = dataclasses.replace(made_up(case, el_Linear=1.5, cpu=1.0), backend="reference")
    result = dataclasses.replace(result, measurements=(*result.measurements, wrong, absent))
    (table,) = tables.summary([result])
    row = dict(zip(table.headings, table.rows[0], strict=True))
    assert row["× nn.Linear"] == "0.667"
    assert row["fraction"] == "0.0417"
    assert row["MACs"] == f"{result.macs:,}"
    assert row["remarks"] == "dense wins; batched is wrong: the output is off; cpu is faster"
    (table,) = tables.summary([dataclasses.replace(result, backend="cpu")])  # the one that ran, without the layer
    assert table.rows[0][-1] == "dense wins; batched is wrong: the output is off"
    (detail,) = tables.details([result])
    names = [row[3] for row in detail.rows]
    assert names == [DENSE, COPYING, OURS, "cpu", "batched"]
    assert set(detail.rows[-1][4:-1]) == {"–"}
    assert tables.refusals([result]).rows == (("triton", "1", "it runs on GPUs"),)
    assert len(tables.dense_wins([result]).rows) == 1

    bench = Bench(this_machine("cpu"), FAST, {"cpu float32": Roofline(1e11, 1e10)}, (Session("today", "a"),), (result,))
    page = tables.page(bench)
    assert "100 GFLOP/s" in page
    assert "| btt | 1024 → 1024 | 2048 |" in page
    assert "missed by" in page
