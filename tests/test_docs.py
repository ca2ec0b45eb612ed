"""The examples of the README and of the contributing guide run."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear.structures import FAMILIES
from tests.families import SAMPLES

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("index", range(3))
def test_readme(index: int) -> None:
    torch.manual_seed(0)
    code = blocks("README.md")
    assert len(code) == 3
    names: dict[str, object] = {}
    exec(compile(code[index], f"README.md, example {index + 1}", "exec"), names)
    if index == 0:
        layer = names["layer"]
        assert isinstance(layer, el.Linear)
        assert round(layer.structure.macs / (1024 * 4096), 3) == 0.094
    if index == 1:
        assert el.structure(str(names["mine"]), 64, 64).macs == 1280
        model = names["model"]
        assert isinstance(model, torch.nn.Sequential)
        assert [type(layer).__name__ for layer in model] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
        assert isinstance(model[0], el.Linear)
        assert float(names["loss"].detach()) < math.log(10)  # of guessing
    if index == 2:
        assert 0 < float(names["error"].detach()) < 1


@pytest.mark.usefixtures("own_registry")
def test_contributing() -> None:
    """The family of the guide is not in the table, and needs nothing but the two places that it names."""
    assert "grouped" not in FAMILIES
    assert "grouped" not in SAMPLES
    names: dict[str, object] = {}
    for code in blocks("CONTRIBUTING.md"):
        exec(code, names)
    samples = names["SAMPLES"]
    assert isinstance(samples, dict)
    for spec in samples["grouped"]:
        layer = el.Linear(48, 40, spec, dtype=torch.float64)
        x = torch.randn(5, 48, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.bias, rtol=0, atol=1e-10)
        assert int(torch.linalg.matrix_rank(layer.dense_weight())) == layer.structure.rank
