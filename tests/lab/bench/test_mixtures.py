"""Mixtures beside what they are compared with: the same numbers, and claims that can be missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.cli.command import assert_refused, run

from einlinear.nn import MoELinear
from einlinear.ops import backends
from einlinear.ops.operands import Gradients
from einlinear_lab.bench import mixtures
from einlinear_lab.bench.cases import Case
from einlinear_lab.bench.mixtures import ALL, COMPARED, MASKED, RANK, MaskedExperts, MixtureResult, ours
from einlinear_lab.bench.timing import Spread


def test_the_masked_baseline_computes_the_mixture() -> None:
    torch.manual_seed(0)
    mixture = MoELinear(16, 64, "btt", experts=8, active=3, bias=False).double()
    torch.nn.init.normal_(mixture.router)
    x = torch.randn(300, 16).double().requires_grad_()
    y, expected = MaskedExperts(mixture)(x), mixture(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *mixture.parameters()]
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MaskedExperts, "_chunk", lambda self, x: 1.01 * self.mixture(x))
        with pytest.raises(RuntimeError, match="all experts, masked has a relative error of"):
            mixtures.measure(Case("btt", 16, 16, 8, "forward"), 0)
    found = backends.find("batched")
    own = found.backward
    for wrong in range(3):  # the gradients of x, gates and factors

        def spoilt(*args: Any, wrong: int = wrong) -> Any:
            results = list(own(*args))
            results[wrong] = [2 * each for each in results[2]] if wrong == 2 else 2 * results[wrong]
            return Gradients(*results)

        monkeypatch.setattr(found, "backward", spoilt)
        with pytest.raises(RuntimeError, match="8 experts has a relative error of 1"):
            mixtures.measure(Case("btt", 16, 16, 8, "train", backend="batched"), 0)


@pytest.mark.parametrize("mode", mixtures.MODES)
def test_all_variants_are_timed(mode: str) -> None:
    result = mixtures.measure(Case("btt", 16, 64, 8, mode), 0)
    assert set(result.seconds) == {*map(ours, mixtures.EXPERTS), MASKED, ALL, RANK}
    assert {over for over in result.ratios[ours(COMPARED)]} == {MASKED, ALL, RANK}
    assert all(spread.median > 0 for spread in result.seconds.values())


def test_single_backends_and_dtypes() -> None:
    benchmark = mixtures.MixtureBenchmark([(16, 16)], [8], ["train"], ["float32", "bfloat16"], backends=["batched"])
    chosen = benchmark.cases()
    assert [str(case) for case in chosen] == [
        "btt, 16 → 16, 8 tokens, train, float32, batched",
        "btt, 16 → 16, 8 tokens, train, bfloat16, batched",
    ]
    for case in chosen:
        assert mixtures.measure(case, 0).ratios[ours(COMPARED)][RANK].median > 0


def test_claims_can_be_missed() -> None:
    def verdicts(ratio: float, case: Case) -> list[str]:
        spread = Spread(ratio, ratio, ratio)
        ratios = {ours(COMPARED): {RANK: spread, MASKED: spread, ALL: spread}, ours(64): {ours(8): spread}}
        conclusions, *_ = mixtures.tables([MixtureResult(case, {}, ratios)])
        return [row[0] for row in conclusions.rows]

    forward = Case("btt", 1024, 2048, 2048, "forward")
    assert verdicts(0.3, forward) == ["passed", "passed", "passed"]
    assert verdicts(2.1, forward) == ["passed", "missed by 84%", "missed by 29%"]
    assert verdicts(2.31, forward)[0] == "missed by 5%"
    assert verdicts(0.39, Case("btt", 1024, 1024, 2048, "train")) == ["passed", "passed"]
    assert verdicts(9.0, Case("btt", 512, 2048, 2048, "forward")) == []


def test_command(tmp_path: Path) -> None:
    tiny = ("bench", "--suite", "moe", "--sizes", "16", "--tokens", "8", "--budget", "0")
    code, out, _ = run(*tiny, "--passes", "forward", "--out", tmp_path)
    assert code == 0
    assert "btt, 16 → 16, 8 tokens, forward" in out
    assert "all experts, masked" in (tmp_path / "moe.md").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "moe.json").read_text(encoding="utf-8"))["results"]) == 1
    code, _, err = run(*tiny, "--backends", "triton,batched", "--passes", "forward", "--out", tmp_path / "two")
    assert code == 1
    assert "8 tokens, forward, float32, triton: einlinear.backend('triton') forces a" in err
    assert len(json.loads((tmp_path / "two" / "moe.json").read_text(encoding="utf-8"))["results"]) == 1
    assert_refused(run(*tiny, "--passes", "decode"), "unknown pass 'decode'")
    assert_refused(run(*tiny, "--backends", "abacus"), "unknown backend 'abacus'")
    if not torch.cuda.is_available():
        assert_refused(run(*tiny, "--device", "cuda"), "there is no CUDA device here")
    assert_refused(run(*tiny, "--structures", "monarch"), "--structures has no meaning for --suite moe")
