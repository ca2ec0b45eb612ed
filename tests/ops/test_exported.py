"""Exported products: the numbers of the reference, and graphs of plain matrix products."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from tests.lab.data.samples import needs
from tests.random_patterns import random_structure
from torch import Tensor, nn

import einlinear as el
from einlinear.ops import exported, reference
from einlinear.ops.operands import Operands
from einlinear.structures import Structure

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
SQUARE = [structures(spec, [(36, 36)])[0] for spec in SPECS]
# odd sizes are padded
PADDED = [el.structure(spec, 37, 41) for spec in ("btt(rank=2)", "dyad", "kronecker")]


@pytest.mark.parametrize("structure", [*SQUARE, *PADDED, *map(random_structure, range(40))], ids=str)
def test_products_equal_those_of_the_reference(structure: Structure) -> None:
    torch.manual_seed(0)
    factors = [torch.randn(factor.shape, dtype=torch.float64) for factor in structure.factors]
    bias = torch.randn(structure.out_features, dtype=torch.float64)
    for tokens in (0, 1, 5):
        x = torch.randn(tokens, structure.in_features, dtype=torch.float64)
        product = Operands(structure, factors, x, bias)
        torch.testing.assert_close(exported.apply(product), reference.apply(product), rtol=1e-12, atol=1e-12)


def operators(program: Any) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_programs_of_torch_export() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = el.Linear(48, 60, "btt(rank=2)", dtype=dtype)
        x = torch.randn(7, 48, dtype=dtype)
        program = torch.export.export(layer, (x[:3],), dynamic_shapes=({0: torch.export.Dim("tokens")},))
        count = operators(program)
        assert count["aten.matmul.default"] == 2
        assert not any("einsum" in name for name in count)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(program.module()(x), layer(x), rtol=tolerance, atol=tolerance)


class Layers(nn.Module):
    """Five structured layers beside each other, two factors each; the last one is padded."""

    def __init__(self) -> None:
        super().__init__()
        specs = ("low_rank(rank=8)", "btt(rank=2)", "monarch(blocks=4)", "dyad")
        self.layers = nn.ModuleList([*(el.Linear(64, 64, spec) for spec in specs), el.Linear(62, 59, "btt(rank=2)")])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x[:, : layer.in_features]) for layer in self.layers]


@needs("onnxruntime")
@needs("onnxscript")
@pytest.mark.filterwarnings("ignore")  # onnx's and its exporter's own
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_graphs(dynamo: bool, tmp_path: Path) -> None:
    """No Einsum, and at most one Transpose per factor is left by onnxruntime's optimiser: none for low rank."""
    import onnx
    import onnxruntime

    model, x = Layers().eval(), torch.randn(9, 64)
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    arguments: dict[str, Any] = {"dynamic_axes": {"x": {0: "tokens"}}}
    if dynamo:
        arguments = {"dynamic_shapes": ({0: torch.export.Dim("tokens", min=1, max=512)},), "verbose": False}
    torch.onnx.export(model, (x[:5],), path, dynamo=dynamo, input_names=["x"], **arguments)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for tokens in (1, 9):
        for y, expected in zip(session.run(None, {"x": x[:tokens].numpy()}), model(x[:tokens]), strict=True):
            torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
    before, after = (Counter(node.op_type for node in onnx.load(file).graph.node) for file in (path, optimized))
    assert "Einsum" not in before
    assert before["MatMul"] + before["Gemm"] == 10
    assert after["Transpose"] <= 8
