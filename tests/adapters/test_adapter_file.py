"""Adapters on disk: whole round trips, and what is said of every kind of wrong file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.adapters.test_adaptation import Block, X, adapted
from tests.lab.data.samples import needs
from torch import nn

import einlinear as el
from einlinear.adapters import AdaptedLinear


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = adapted("btt(rank=2)", scale=0.5, dropout=0.25, layers=["dense", "structured"])
    el.adapters.save(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = adapted({"head": "low_rank(rank=2)", "*": "(g a), g r f a, f e g r -> (e f) where r=2"}, scale=0.5)
    torch.manual_seed(1)
    fresh = Block()
    path = tmp_path / "a.safetensors"
    el.adapters.save(model, path)
    report = el.adapters.load(fresh, path)
    assert torch.equal(fresh(X), model(X))
    assert report.trainable == sum(p.numel() for n, p in model.named_parameters() if "adapters" in n)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    for layer, other in zip(model.modules(), fresh.modules(), strict=True):
        if isinstance(layer, AdaptedLinear):
            assert isinstance(other, AdaptedLinear)
            assert repr(layer.adapters["default"]) == repr(other.adapters["default"])
    with torch.no_grad():
        fresh.dense.adapters["default"].A.zero_()
    el.adapters.load(fresh, path)
    assert torch.equal(fresh(X), model(X))
    el.adapters.load(fresh, path, name="second")
    el.adapters.activate(fresh, "second")
    assert torch.equal(fresh(X), model(X))
    # a compiled model has the same names
    torch.manual_seed(1)
    compiled = torch.compile(Block(), backend="eager")
    el.adapters.load(compiled, path)
    torch.testing.assert_close(compiled(X), model(X))
    el.adapters.save(compiled, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(path).keys()


def test_save_needs_a_name_among_several(tmp_path: Path) -> None:
    model = adapted()
    el.adapt(model, "btt", name="second")
    with pytest.raises(ValueError, match="several adapters: name one of default, second"):
        el.adapters.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no adapter named 'third'"):
        el.adapters.save(model, tmp_path / "a.safetensors", "third")
    el.adapters.save(model, tmp_path / "a.safetensors", "second")
    assert el.adapters.load(Block(), tmp_path / "a.safetensors").adapter == "second"
    with pytest.raises(OSError, match="cannot be written"):
        el.adapters.save(model, tmp_path / "missing" / "a.safetensors", "second")
    with torch.device("meta"):
        meta = Block()
    with pytest.raises(ValueError, match=r"cannot be loaded: .* is on the meta device: load the model first"):
        el.adapters.load(meta, tmp_path / "a.safetensors")
    el.adapt(meta, "btt")
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        el.adapters.save(meta, tmp_path / "b.safetensors")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, content = load_file(path), json.loads(metadata["metadata"])
    change(tensors, content)
    save_file(tensors, path, metadata | {"metadata": json.dumps(content)})


def entry(content: dict[str, Any]) -> Any:
    return content["layers"]["dense"]


@needs("transformers")
def test_save_pretrained_of_an_adapted_model_is_refused(tmp_path: Path) -> None:
    from tests.integrations.transformers.models import make, output

    model = make("gpt2", None)
    el.adapt(model, "btt", "*.c_attn")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn has adapters, .* el\.adapters\.save\(model, path\)"):
        model.save_pretrained(tmp_path)
    before = output(model)
    el.adapters.merge(model)
    el.adapters.remove(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("dense.A"), "it has no tensor dense.A"),
        (lambda t, m: t.update(other=torch.ones(1)), "tensors that belong to no layer: other"),
        (lambda t, m: t.update({"dense.A": torch.ones(3)}), r"dense.A has shape \(3,\) .* has floats of \("),
        (lambda t, m: t.update({"dense.A": t["dense.A"].int()}), "dense.A has shape .* dtype torch.int32"),
        (lambda t, m: m.update(kind="other"), "it is no file of el.adapters.save"),
        (lambda t, m: m.pop("layers"), "its metadata name no adapter or no layers"),
        (lambda t, m: m.update(layers={}), "its metadata name no adapter or no layers"),
        (lambda t, m: m.update(adapter="a.b"), "name must be a word without dots"),
        (lambda t, m: entry(m).update(structure="mono"), "dense: .*mono"),
        (lambda t, m: entry(m).update(structure=5), "its metadata of dense are"),
        (lambda t, m: entry(m).pop("scale"), "its metadata of dense are"),
        (lambda t, m: entry(m).update(scale=float("nan")), "scale must be finite"),
        (lambda t, m: entry(m).update(dropout=2.0), "dropout must be from 0"),
        (lambda t, m: entry(m).update(in_features=32), "dense has 64 -> 96 features, but 32 -> 96 in the file"),
        (lambda t, m: m["layers"].update(q_proj=entry(m)), "the model has no linear layer q_proj, but dense"),
    ],
)
def test_wrong_files(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    model = Block()
    with pytest.raises(ValueError, match=f"the adapter .*a.safetensors cannot be loaded: .*{message}"):
        el.adapters.load(model, saved)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_damaged_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for damaged in (b"", content[:100], content[:-10], b"x" * 200, b"\xff" * 8 + content[8:]):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.safetensors cannot be loaded: "):
            el.adapters.load(Block(), saved)
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(ValueError, match="cannot be loaded: it has format None"):
        el.adapters.load(Block(), saved)
    with pytest.raises(FileNotFoundError, match=r"there is no adapter .*missing"):
        el.adapters.load(Block(), tmp_path / "missing")


def test_another_adapter_of_the_same_name(saved: Path) -> None:
    model = adapted("btt(rank=2)")
    before = model(X)
    with pytest.raises(ValueError, match=r"another adapter named 'default': conv1d has .*none in the file"):
        el.adapters.load(model, saved)
    assert torch.equal(model(X), before)
    el.adapters.load(model, saved, "second")
    merged = nn.Sequential(nn.Linear(64, 96))
    el.adapt(merged, "btt")
    el.adapters.merge(merged)
    el.adapters.save(merged, saved)
    with pytest.raises(ValueError, match="0 has adapters that are merged"):
        el.adapters.load(merged, saved)
