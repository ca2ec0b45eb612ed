"""Resume cache: damaged files are named, and cost no more than their results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.checkpoint import read_tensors
from einlinear.compression.resume_cache import ResumeCache


def content_of(path: Path) -> Any:
    """The content of a file, whose metadata safetensors writes in any order."""
    if path.suffix == ".json":
        return path.read_bytes()
    tensors, metadata = read_tensors(path)
    return {name: tensor.tolist() for name, tensor in tensors.items()}, metadata


RECORD = {"error": 0.5, "tokens": 10_000_000}


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_truncated_file_is_computed_again(cut: int, tmp_path: Path) -> None:
    cache = ResumeCache(tmp_path / "a", {}, "results")
    tensors = ({"x": torch.arange(3.0)}, RECORD)
    for record, has_tensors in ((RECORD, False), (tensors, True)):
        result = cache.get_or("fit of 0", lambda record=record: record, tensors=has_tensors)
        assert result[1] == RECORD if has_tensors else result == RECORD
        # the file is read, not computed
        result = cache.get_or("fit of 0", pytest.fail, tensors=has_tensors)
        assert result[1] == RECORD if has_tensors else result == RECORD
        (path,) = (tmp_path / "a").glob("fit*.safetensors" if has_tensors else "fit*.json")
        content = content_of(path)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.warns(UserWarning, match=rf"a/{path.name} is damaged, so its result is computed again"):
            cache.get_or("fit of 0", lambda record=record: record, tensors=has_tensors)
        assert content_of(path) == content


def test_keys_have_files_of_their_own(tmp_path: Path) -> None:
    cache = ResumeCache(tmp_path, {}, "results")
    keys = ["a.b", "a/b", "a b", "x" * 500, "x" * 501]
    assert [cache.get_or(key, lambda key=key: len(key)) for key in keys] == [3, 3, 3, 500, 501]
    assert len([*tmp_path.iterdir()]) == 6
    assert cache.get_or("x" * 501, pytest.fail) == 501


@pytest.mark.parametrize("content", ["", "{", "null", "[1]"])
def test_damaged_configs_are_named(content: str, tmp_path: Path) -> None:
    ResumeCache(tmp_path, {"seed": 0}, "results")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .* to start anew"):
        ResumeCache(tmp_path, {"seed": 0}, "results")


@pytest.mark.parametrize("content", ["null", "[]", "{}", "3", '"abc"', "[[1]]", '{"structures": {}, "slow": 3}'])
def test_records_of_the_wrong_shape_are_named(content: str, tmp_path: Path) -> None:
    compressed(tmp_path)
    for path in sorted(tmp_path.glob("*-*.json")):
        right = path.read_bytes()
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} does not hold a result .* delete the file"):
            compressed(tmp_path)
        path.write_bytes(right)


def compressed(folder: Path) -> tuple[list[tuple[str, str]], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    batches = [torch.randn(32, 16)]
    report = el.compress(model, 0.6, ["low_rank"], calibration=batches, cache_dir=folder)
    return [(layer.name, layer.structure) for layer in report.layers], model(batches[0])


def test_a_compression_goes_on_with_any_of_its_files_truncated(tmp_path: Path) -> None:
    expected = compressed(tmp_path / "a")
    files = sorted(path for path in (tmp_path / "a").iterdir() if path.name != "config.json")
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        content = content_of(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.warns(UserWarning, match="is damaged, so its result is computed again"):
            found = compressed(tmp_path / "a")
        assert found[0] == expected[0]
        torch.testing.assert_close(found[1], expected[1])
        # layers that are timed again take other times
        assert content_of(path) == content or path.name.startswith("seconds_of")
