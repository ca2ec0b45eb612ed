"""OpenVINO runs structured layers as matrix products, from the module, from `torch.export` and from an ONNX file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs
from torch import nn

import einlinear as el

pytestmark = needs("openvino")

STRUCTURES = ("low_rank(rank=16)", "btt(rank=2)", "monarch", "blast(blocks=4, rank=8)", "dyad")


def convert(model: nn.Module, x: torch.Tensor, source: str, folder: Path) -> Any:
    import openvino as ov

    if source == "module":
        return ov.convert_model(model, example_input=x)
    if source == "exported":
        return ov.convert_model(torch.export.export(model, (x,)))
    torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=True, verbose=False)
    return ov.convert_model(folder / "model.onnx")


@pytest.mark.parametrize("source", ["module", "exported", "onnx"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs(structure: str, source: str, tmp_path: Path) -> None:
    import openvino as ov

    layers = el.Linear(64, 128, structure), nn.GELU(), el.Linear(128, 64, structure)
    model, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.randn(3, 64)
    with warnings.catch_warnings():
        # its own, about other versions of torch
        warnings.simplefilter("ignore")
        converted = convert(model, x, source, tmp_path)
    operations = {operation.get_type_name() for operation in converted.get_ops()}
    assert "MatMul" in operations
    assert "Einsum" not in operations
    # else bfloat16 where the processor has it
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x), atol=1e-4, rtol=1e-4)
