"""The benchmark of a GPU: a rehearsal on the CPU, failures and time limits, the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs

from einlinear_lab.bench import gpu
from einlinear_lab.bench import gpu_day as day
from einlinear_lab.bench.gpu_page import GPTS, conclude, judge_backends
from einlinear_lab.bench.machine import this_machine

ROOT = Path(__file__).parents[3]


def row(batched: float, triton: float, **more: Any) -> dict[str, Any]:
    ms = {"nn.Linear": [4.0] * 3, "batched": [batched] * 3, "triton": [triton] * 3}
    return {"pass": "train", "ms": ms, "peak_mb": {}, "failed": []} | more


def record(**results: dict[str, Any]) -> dict[str, Any]:
    parts = {part: {"status": "complete", "results": rows, "failures": {}} for part, rows in results.items()}
    return {"rehearsal": False, "parts": parts}


CHECKED = {"pytest": {"passed": 9, "failed": []}}


@needs("triton")
@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [ROOT / "tools" / "gpu_day.sh", "--rehearse", "--budget", "1500", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "gpu.log").read_text() + (tmp_path / "warm.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {part: state["status"] for part, state in found["parts"].items()} == dict.fromkeys(day.SHARES, "complete")
    for part in (day.SUITE, day.TUNED, day.BLOCKS, day.MIXTURES, GPTS):
        for result in found["parts"][part]["results"].values():
            assert {"nn.Linear", "batched", "triton"} <= result["ms"].keys()
            assert ("fused" in result["ms"]) == (part in (day.BLOCKS, GPTS))
    assert len(found["parts"][day.BLOCKS]["results"]) == 4
    suite = found["parts"][day.SUITE]["results"].values()
    assert all({"torch.compile", "copying"} <= result["ms"].keys() for result in suite)
    page = (tmp_path / "gpu.md").read_text()
    for text in (
        torch.__version__,
        found["triton"],
        found["command"],
        found["date"],
        "times mean nothing",
        "## Verdict",
    ):
        assert text in page
    assert "Traceback" not in log
    assert "by the geometric mean over 4 cases" in done.stdout


def test_a_failed_case_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> gpu.Row:
        raise RuntimeError("CUDA error: an illegal memory access")

    ran: list[str] = []
    cases = {"a": lambda: row(1.0, 2.0), "b": fail, "c": lambda: ran.append("c") or row(1.0, 3.0)}
    monkeypatch.setattr(day, "items", lambda *args: cases)
    head = {"rehearsal": False, "machine": vars(this_machine("cpu")), "driver": "1", "triton": "3", "date": "today"}
    day.save({**head, "command": "gpu_day", "parts": {}}, tmp_path)
    assert day.run_part(day.SUITE, gpu.TINY, tmp_path, 60) == day.RESTART
    assert not ran
    # as in a new process
    assert day.run_part(day.SUITE, gpu.TINY, tmp_path, 60) == 0
    state = day.load(tmp_path)["parts"][day.SUITE]
    assert state["status"] == "failed in 1 of 3 cases"
    assert set(state["results"]) == {"a", "c"}
    assert state["failures"] == {"b": "RuntimeError: CUDA error: an illegal memory access"}
    assert "illegal memory access" in (tmp_path / "gpu.md").read_text()


def test_a_part_starts_nothing_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day, "items", lambda *args: {"a": lambda: row(1.0, 2.0)})
    monkeypatch.setattr(day, "page", lambda record: "")
    day.save({"parts": {}}, tmp_path)
    assert day.run_part(day.SUITE, gpu.TINY, tmp_path, 0) == 0
    assert day.load(tmp_path)["parts"][day.SUITE]["status"] == "out of time after 0 of 1 cases"


@pytest.mark.slow
def test_parts_that_crash_or_hang_do_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        day.KERNELS: "import sys; sys.exit('the driver is gone')",
        day.SUITE: "import time; time.sleep(600)",
        "warm": "import time; time.sleep(600)",
    }
    running: list[subprocess.Popen[bytes]] = []

    def fake(options: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        part = options[options.index("--part") + 1]
        if part not in programs:
            day.record_end(part, tmp_path, "complete")
        with log.open("ab") as output:
            command = [sys.executable, "-c", programs.get(part, "")]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        running.append(process)
        return process

    monkeypatch.setattr(day, "start", fake)
    monkeypatch.setattr(day, "SHARES", {day.KERNELS: 0.1, day.SUITE: 0.1, day.TUNED: 0.8})
    assert day.run_all(gpu.TINY, tmp_path, 30.0, False) == 1
    states = {part: state["status"] for part, state in day.load(tmp_path)["parts"].items()}
    assert "failed with exit status 1" in states[day.KERNELS]
    assert "the driver is gone" in states[day.KERNELS]
    assert states[day.SUITE].startswith("stopped at its limit of")
    assert states[day.TUNED] == "complete"
    assert all(process.poll() is not None for process in running)


def test_the_verdict_is_the_geometric_mean() -> None:
    layers = {"x": row(6.0, 1.0), "y": row(2.0, 3.0), "z": row(1.0, 1.2), "only batched": {"ms": {"batched": [1.0]}}}
    verdict = judge_backends(layers)
    assert (verdict.default, verdict.cases, dict(verdict.wrong)) == ("triton", 3, {"y": 1.5})
    assert verdict.gain == pytest.approx((6 * (2 / 3) / 1.2) ** (1 / 3))
    other = judge_backends({"x": row(1.0, 3.0), "y": row(2.0, 1.0)})
    assert (other.default, dict(other.wrong)) == ("batched", {"y": 2.0})
    assert other.gain == pytest.approx(1.5**0.5)
    assert judge_backends({}) is None
    text = conclude(record(kernels=CHECKED, suite={"x": row(6.0, 1.0), "y": row(2.0, 3.0)}))
    assert "**triton** by default, 2x as fast as batched" in text
    assert "batched is faster by more than 1.3x in 1 cases:\n- 1.5x: y" in text
    assert "no case was measured with both batched and triton" in text
    assert "no case was measured with both batched and fused" in text
    fused = {"x": {"ms": row(6.0, 7.0)["ms"] | {"fused": [2.0] * 3}, "failed": [], "peak_mb": {}}}
    text = conclude(record(kernels=CHECKED, blocks=fused))
    assert "Feed-forward blocks" in text
    assert "**fused** by default, 3x as fast as batched" in text


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"kernels": {"pytest": {"failed": ["test_x"]}}, "suite": {"x": row(6.0, 1.0)}}, "**batched**, whatever"),
        ({"kernels": CHECKED, "suite": {"x": row(6.0, 1.0, failed=["triton: off by 1"])}}, "**batched**, whatever"),
        ({"kernels": CHECKED, "blocks": {"x": row(6.0, 1.0, failed=["fused: off by 1"])}}, "**batched**, whatever"),
        ({"suite": {"x": row(6.0, 1.0)}}, "The kernels were not checked"),
    ],
)
def test_wrong_kernels_are_no_default(results: Any, expected: str) -> None:
    assert conclude(record(**results)).startswith(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "no CUDA device"),
        (["--rehearse"], "TRITON_INTERPRET"),
        (["--budget", "0"], "positive"),
    ):
        with pytest.raises(SystemExit) as ended:
            day.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_without_pytest_a_few_kernels_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*day.items(day.KERNELS, gpu.TINY, {"failures": {}}, 0.0)] == [f"pytest {' '.join(day.TESTS)}"]
    # after the tests could not run
    assert len(day.items(day.KERNELS, gpu.TINY, {"failures": {"pytest": ""}}, 0.0)) == 19
    monkeypatch.setattr(day, "find_spec", lambda package: None)
    checks = day.items(day.KERNELS, gpu.TINY, {"failures": {}}, 0.0)
    assert len(checks) == 18
    assert not any("pytest" in name for name in checks)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that compiles for an H100 and can run nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    monkeypatch.setattr(driver, "_active", Driver())


@needs("triton")
@pytest.mark.slow
@pytest.mark.usefixtures("hopper")
def test_what_is_compiled_ahead_is_what_tuning_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    import einlinear as el
    from einlinear.ops.operands import Operands
    from einlinear.ops.triton import launch, triton_backend

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls: list[Any] = []
    monkeypatch.setattr(launch, "_launch", lambda *args, **constants: calls.append((args, constants)))
    s, x = el.structure("low_rank(rank=32)", 64, 64), torch.empty(256, 64, dtype=torch.bfloat16)
    triton_backend.forward(Operands(s, [torch.empty(f.shape, dtype=x.dtype) for f in s.factors], x, None), True)
    (kernel, sizes, tiles, *args), constants = calls[0]
    day.compile_all(kernel, sizes, tiles[:2], *args, **constants)
    compiled = {*tmp_path.rglob("*.cubin")}
    assert len(compiled) == 2
    for tile in tiles[:2]:
        # as triton.autotune launches
        config = triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages)
        kernel.device_caches.clear()
        kernel.run(*args, grid=(1,), warmup=True, **constants, **launch.OPTIONS, **config.all_kwargs())
    assert {*tmp_path.rglob("*.cubin")} == compiled
