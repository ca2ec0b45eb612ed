"""Quantized layers in folders: the description names the precision, and the stored bits are those of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integrations.transformers.models import make, output
from transformers import BertForMaskedLM

import einlinear as el
from einlinear.nn.quantized_linear import QuantizedLinear


@pytest.fixture(scope="module")
def compressed() -> BertForMaskedLM:
    """A model with structured, quantized layers and with dense ones."""
    model = make("bert", None)
    report = el.compress(model, 0.13, ["low_rank"], count="bytes", layers=["*.attention.*", "*.layer.1.*"])
    assert any(layer.precision for layer in report.layers)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_keeps_the_bits(compressed: BertForMaskedLM, dtype: torch.dtype, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path)
    loaded, info = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers
    for name, layer in layers.items():
        twin = compressed.get_submodule(name)
        assert (layer.precision, layer.structure, layer.nbytes) == (twin.precision, twin.structure, twin.nbytes)
        assert all(torch.equal(*pair) for pair in zip(layer.buffers(), twin.buffers(), strict=True))
        assert layer.dense_weight().dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(output(loaded), output(compressed))
    else:
        assert output(loaded).isfinite().all()


def test_a_file_that_lacks_codes(compressed: BertForMaskedLM, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[next(key for key in weights if key.endswith("_codes"))]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"_codes of shape \(.*\) did not come from the checkpoint"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_an_unknown_precision(compressed: BertForMaskedLM, tmp_path: Path) -> None:
    compressed.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    entry = next(e for e in config["quantization_config"]["layers"].values() if "precision" in e)
    entry["precision"] = "fp4"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an integer format is written as"):
        BertForMaskedLM.from_pretrained(tmp_path)
