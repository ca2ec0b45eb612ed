"""`einlinear bench`."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from tests.lab.bench.made_up import made_up
from tests.lab.cli.command import assert_refused, run
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops import dispatch
from einlinear_lab.bench import results
from einlinear_lab.bench.cases import BenchConfig, Case
from einlinear_lab.bench.machine import Roofline
from einlinear_lab.bench.results import BenchResult

BENCH = ("bench", "--structures", "btt", "--sizes", 64, "--tokens", 32, "--budget", 0)
TINY = (*BENCH, "--passes", "forward")


@pytest.fixture(autouse=True)
def _known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the machine's peaks."""
    monkeypatch.setattr("einlinear_lab.bench.run.measure_roofline", lambda *_: Roofline(1e11, 1e10))


def test_a_tiny_case_and_again(tmp_path: Path) -> None:
    code, out, _ = run(*TINY, "--out", tmp_path, "--variants")
    assert code == 0
    assert "1 of 1 cases to measure" in out
    for name in ("nn.Linear", "el.Linear", "reference", "batched", "copying"):
        assert re.search(rf"64 → 64 +32 +{name} ", out)
    assert "64 → 64" in (tmp_path / "bench.md").read_text()
    kept = (tmp_path / "bench.json").read_text()

    code, out, _ = run(*TINY, "--out", tmp_path)
    assert code == 0
    assert "has all cases already" in out
    assert (tmp_path / "bench.json").read_text() == kept

    assert_refused(run(*TINY, "--out", tmp_path, "--threads", 2), "threads was 1, now 2")
    torch.set_num_threads(1)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = run(*TINY, "--out", tmp_path)
    assert code == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear_lab.cli.bench.find_spec", lambda name: None)
    code, _, err = run(*TINY, "--out", tmp_path)
    assert code == 0
    assert "drawn with matplotlib" in err
    assert not (tmp_path / "bench.png").exists()


def test_a_wrong_result_gets_no_speedup_and_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear

    def wrong(structure: object, factors: object, x: Tensor, *rest: object) -> Tensor:
        return 1.01 * right(structure, factors, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "linear", wrong)
    code, out, err = run(*TINY, "--out", tmp_path)
    assert code == 1
    assert "el.Linear: the output is off by" in err
    row = next(line for line in out.splitlines() if line.startswith("btt "))
    assert re.search(r" –  +cpu  +–  +–  +–  +–  +–  +–  +–  +el.Linear is wrong: ", row)


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(case: Case, config: BenchConfig, roofline: Roofline) -> BenchResult:
        if case.mode == "train":
            raise KeyboardInterrupt
        return made_up(case, el_Linear=0.2)

    monkeypatch.setattr("einlinear_lab.bench.run.measure", impatient)
    code, _, err = run(*BENCH, "--out", tmp_path)
    assert code == 130
    assert "the same command resumes" in err
    assert [result.case.mode for result in results.read(tmp_path / "bench.json").results] == ["forward"]


def test_nothing_but_slow_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear_lab.bench.run.measure_roofline", lambda *_: Roofline(1e4, 1e10))
    assert_refused(run(*TINY, "--out", tmp_path / "out"), "every case would take longer than 20 seconds")


def test_compare_shows_what_changed(tmp_path: Path) -> None:
    run(*TINY, "--out", tmp_path / "old")
    old = tmp_path / "old" / "bench.json"
    before = results.read(old)
    slower = made_up(before.results[0].case, el_Linear=500.0)
    results.write(dataclasses.replace(before, results=(slower,)), old)
    code, out, _ = run("bench", "--compare", old, "--out", tmp_path / "new")
    assert code == 0
    assert "1 of 1 cases to measure" in out
    lines = out[out.index("Changes of the speed-up") :].splitlines()
    line = next(line.split() for line in lines if " el.Linear " in line)
    assert line[-1] == "faster"

    code, out, _ = run("bench", "--compare", tmp_path / "old", "--out", tmp_path / "new")
    assert "has all cases already" in out


def test_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear_lab.bench.cold.LEAST", 100_000)
    cache, layer, x = tmp_path / "cache", el.Linear(64, 64, "btt"), torch.randn(8, 64)
    if ops.reason_unsupported("cpu", layer.structure, x.dtype, x.device):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("EINLINEAR_CACHE", str(cache))
    dispatch.forget()
    command = "bench", "--calibrate", "--structures", "btt", "--sizes", 64, "--tokens", "1,32", "--budget", 0
    try:
        for _ in range(2):
            code, out, _ = run(*command, "--out", tmp_path / "out")
            assert code == 0
            # never the results of an earlier calibration
            assert "3 of 3 cases to measure" in out
        assert f"Coefficients of the cost model: {cache / 'costs.json'}" in out.replace("\n", "")
        assert "with coefficients calibrated on this machine" in el.explain(layer, x).reason
    finally:
        dispatch.forget()
    assert_refused(run("bench", "--calibrate", "--dtype", "float16"), "--dtype has no meaning with --calibrate")
    assert_refused(run("bench", "--suite", "moe", "--calibrate"), "--calibrate has no meaning for --suite moe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--structures", "bttt"), "Did you mean 'btt'"),
        (("--suite", "slow"), "unknown suite 'slow'"),
        (("--sizes", "1x2x3"), "'1x2x3' is no size"),
        (("--sizes", "many"), "--sizes: 'many' is no number"),
        (("--passes", "backward"), "unknown pass 'backward'"),
        (("--backends", "abacus"), "unknown backend 'abacus'"),
        (("--device", "cuda"), "no CUDA device"),
        (("--compare", "nowhere.json"), "nowhere.json does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert_refused(run("bench", *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
