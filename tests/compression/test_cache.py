"""What a compression keeps: damage is named, and costs no more than what the file held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.compression.cache import Journal


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_truncated_file_is_as_none(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", {}, "results")
    journal.write("fit", {"error": 0.5, "tokens": 10_000_000})
    journal.write_tensors("layer", {"x": torch.arange(3.0)})
    assert journal.read("fit") == {"error": 0.5, "tokens": 10_000_000}
    for name, read in (("fit.json", journal.read), ("layer.safetensors", journal.read_tensors)):
        path = tmp_path / "a" / name
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.warns(UserWarning, match=rf"a/{name} is damaged, so what it held is computed again"):
            assert read(path.stem) is None


@pytest.mark.parametrize("content", ["", "{", "null", "[1]"])
def test_damaged_settings_are_named(content: str, tmp_path: Path) -> None:
    Journal(tmp_path, {"seed": 0}, "results")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json .* to start anew"):
        Journal(tmp_path, {"seed": 0}, "results")


def compressed(folder: Path) -> tuple[list[tuple[str, str]], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    batches = [torch.randn(32, 16)]
    report = el.compress(model, 0.6, ["low_rank"], calibration=batches, folder=folder)
    return [(layer.name, layer.structure) for layer in report.layers], model(batches[0])


def test_a_compression_goes_on_with_any_of_its_files_truncated(tmp_path: Path) -> None:
    expected = compressed(tmp_path / "a")
    files = sorted(path for path in (tmp_path / "a").iterdir() if path.name != "settings.json")
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.warns(UserWarning, match="is damaged, so what it held is computed again"):
            found = compressed(tmp_path / "a")
        assert found[0] == expected[0]
        torch.testing.assert_close(found[1], expected[1])
        assert path.read_bytes() == content
