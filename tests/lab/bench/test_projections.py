"""`einlinear bench --suite projection`: methods of projection, interleaved, all with the same error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.lab.cli.command import assert_refused, run
from torch import Tensor

from einlinear_lab.bench import projections


@pytest.mark.parametrize("spec", ["monarch(blocks=4)", "btt(rank=2)", "low_rank(rank=8)", "btt(cores=3)"])
def test_all_methods_leave_the_same_error(spec: str) -> None:
    result = projections.measure(spec, (96, 80), rounds=1)
    assert result.seconds.keys() == result.memory.keys() == projections.METHODS.keys()
    assert max(result.error.values()) == pytest.approx(min(result.error.values()), rel=1e-4)
    assert min(result.memory.values()) > 0


def test_a_method_that_is_worse_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return matrices[:, :, :rank], torch.eye(rank, matrices.shape[2]).expand(len(matrices), -1, -1)

    monkeypatch.setitem(projections.METHODS, projections.OURS, poor)
    with pytest.raises(RuntimeError, match=r"btt: the error of el\.Linear\.from_dense is .*, that of the SVD"):
        projections.measure("btt", (96, 80), rounds=1)


def test_the_command(tmp_path: Path) -> None:
    command = ("bench", "--suite", "projection", "--sizes", "64x48", "--out", tmp_path)
    code, out, err = run(*command, "--structures", "btt; low_rank(rank=4)")
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "projection.json").read_text())
    assert [result["spec"] for result in content["results"]] == ["btt", "low_rank(rank=4)"]
    page = (tmp_path / "projection.md").read_text()
    for method in projections.METHODS:
        assert method in out
        assert method in page
    assert_refused(run(*command, "--tokens", 16), "--tokens has no meaning for --suite projection")
    assert_refused(run(*command, "--structures", "btr"), "unknown family 'btr'")
