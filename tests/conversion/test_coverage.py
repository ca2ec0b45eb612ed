"""What share of a model a report speaks of, and what kinds of parameters it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.conversion.conversion_report import KINDS, measure_coverage


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))


@pytest.mark.parametrize(
    ("module", "kind", "params", "name"),
    [
        (nn.Conv2d(3, 8, 3, bias=False), "convolutions", 216, "part"),
        (nn.ConvTranspose1d(3, 8, 3, bias=False), "convolutions", 72, "part"),
        (
            nn.LSTM(4, 6, bidirectional=True),
            "recurrent layers",
            576,
            "part",
        ),
        (nn.GRUCell(4, 6), "recurrent layers", 3 * 6 * (4 + 6 + 2), "part"),
        (nn.MultiheadAttention(8, 2, bias=False), "packed attention projections", 192, "part.in_proj_weight"),
        (Experts(), "expert stacks and other 3-D weights", 512, "part.up"),
        (Experts(), "other parameters", 48, "part.position"),
        (Experts(), "biases, norms and other vectors", 8, "part.token"),
        (nn.Embedding(10, 4), "embeddings", 40, "part"),
        (el.Linear(16, 16, "btt", bias=False), "structured layers", 128, "part"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 8, 3, bias=False)), "convolutions", 72, "part"),
        (nn.Bilinear(3, 4, 5, bias=False), "other parameters", 60, "part.weight"),
    ],
)
def test_kinds(module: nn.Module, kind: str, params: int, name: str) -> None:
    model = nn.ModuleDict({"part": module, "linear": nn.Linear(8, 8, bias=False)})
    coverage = measure_coverage(model, [model["linear"]])
    (found,) = [other for other in coverage.others if other.kind == kind]
    assert (found.params, found.names) == (params, (name,))
    assert found.kind in KINDS
    assert coverage.considered == 64
    assert coverage.params == 64 + sum(other.params for other in coverage.others)
    assert coverage.params == sum(p.numel() for p in model.parameters())


def test_tied_tensors_count_once_and_as_embeddings() -> None:
    for order in (("head", "table"), ("table", "head")):
        modules = {"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10)}
        modules["head"].weight = modules["table"].weight  # type: ignore[assignment]
        model = nn.ModuleDict({name: modules[name] for name in order})
        coverage = measure_coverage(model, [])
        assert coverage.params == 50
        assert [(other.kind, other.params) for other in coverage.others] == [
            ("embeddings", 40),
            ("biases, norms and other vectors", 10),
        ]


def test_the_warning_is_for_less_than_half() -> None:
    convolution, linear = nn.Conv1d(8, 8, 3, bias=False), nn.Linear(8, 8, bias=False)
    few = measure_coverage(nn.Sequential(convolution, linear), [linear])
    assert few.share == 0.25
    assert few.warning is not None
    assert "only 25.0% of the model's parameters: 75% are in convolutions" in few.warning
    assert "192 in convolutions (0)" in few.notes[1]
    assert measure_coverage(nn.Sequential(linear, nn.Linear(8, 7, bias=False)), [linear]).warning is None
    many = nn.Sequential(linear, *[nn.Conv1d(8, 8, 3, bias=False) for _ in range(5)])
    assert "convolutions (1, 2, 3 and 2 more)" in measure_coverage(many, [linear]).notes[1]


def test_parameters_without_a_size_yet() -> None:
    coverage = measure_coverage(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), [])
    assert coverage.params == 20
