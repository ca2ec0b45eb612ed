"""Output metrics against the model's Jacobian, and fits in a metric against the best ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.ops.test_projection_of_outputs import correlated
from torch import Tensor, nn

from einlinear import ops
from einlinear.compression.output_metric import OutputMetric, measure_output_metrics, project_in_metric
from einlinear.compression.spectrum import Spectrum, low_ranks
from einlinear.structures import structure


def weighted_error(w: Tensor, v: Tensor, c: Tensor, g: Tensor) -> float:
    return float(torch.trace(g @ (w - v) @ c @ (w - v).T) / torch.trace(g @ w @ c @ w.T))


@pytest.mark.parametrize("spec", ["low_rank(rank=10)", "monarch(blocks=4)", "blast(blocks=4, rank=8)"])
@pytest.mark.parametrize("is_diagonal", [False, True])
@pytest.mark.parametrize("size", [32, 30])
def test_fits_in_a_metric(spec: str, is_diagonal: bool, size: int) -> None:
    """Of 30 outputs, four blocks are padded."""
    torch.manual_seed(0)
    s, w, c = structure(spec, 48, size), torch.randn(size, 48, dtype=torch.float64), correlated(48).double()
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)
    g = scales.diag() if is_diagonal else scales[:, None] * correlated(size).double() * scales
    metric = OutputMetric(scales if is_diagonal else g)
    plain, weighted = (
        weighted_error(w, ops.dense_weight(s, project_in_metric(s, w, c, given)), c, g) for given in (None, metric)
    )
    assert weighted < 0.95 * plain


@pytest.mark.parametrize("size", [(48, 32), (32, 48)])
def test_low_rank_of_every_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w, c, g = torch.randn(size, dtype=torch.float64), correlated(size[1]).double(), correlated(size[0]).double()
    metric = OutputMetric(g)
    after, before, energies = low_ranks(w, c, metric)
    spectrum = Spectrum.of(w, energies)
    for rank in (1, 10, 20):
        s = structure(f"low_rank(rank={rank})", size[1], size[0])
        v = after[:, :rank] @ before[:rank]
        expected = ops.dense_weight(s, project_in_metric(s, w, c, metric))
        assert weighted_error(w, v, c, g) == pytest.approx(weighted_error(w, expected, c, g), rel=1e-3)
        assert spectrum.errors[rank] == pytest.approx(weighted_error(w, v, c, torch.eye(size[0]).double()), rel=1e-6)


def test_structures_that_absorb_no_metric() -> None:
    w, c, metric = torch.randn(16, 16), correlated(16), OutputMetric(correlated(16))
    s = structure("kronecker", 16, 16)
    for found, expected in zip(project_in_metric(s, w, c, metric), ops.project(s, w, c), strict=True):
        torch.testing.assert_close(found, expected)


def measured(model: Any, layer: nn.Module, batches: list[Tensor]) -> Tensor:
    moment = measure_output_metrics(model, {"layer": layer}, batches)["layer"].gradient_moment
    assert all(p.requires_grad for p in model.parameters())
    return moment / (moment if moment.dim() == 1 else moment.diagonal()).mean()


@pytest.mark.parametrize("outputs", [6, 10])
def test_outputs_that_later_layers_multiply(outputs: int) -> None:
    """In a linear model G is the product of the later weight with itself; wide outputs have its diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, outputs), nn.Linear(outputs, 4))
    found = measured(model, model[0], [torch.randn(500, 8) for _ in range(12)])
    expected = (model[1].weight.T @ model[1].weight).detach()
    expected = expected / expected.diagonal().mean()
    torch.testing.assert_close(found, expected if outputs == 6 else expected.diagonal(), rtol=0.3, atol=0.3)


def test_logits_have_the_fisher_information() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
            self.head.weight.data.mul_(3)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.first(x)))

    torch.manual_seed(0)
    model, batches = Model(), [torch.randn(512, 8) for _ in range(12)]
    found = measured(model, model.first, batches)
    p = model(batches[0]).logits.softmax(1).detach()
    hessian = p.mean(0).diag() - p.T @ p / len(p)
    expected = (model.head.weight.T @ hessian @ model.head.weight).detach()
    torch.testing.assert_close(found, expected / expected.diagonal().mean(), rtol=0.3, atol=0.3)


def test_layers_that_the_output_does_not_depend_on() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.forward = lambda x: model[0](x) + 0 * model[1](x)  # type: ignore[method-assign]
    assert list(measure_output_metrics(model, {"0": model[0], "1": model[1]}, [torch.randn(9, 4)])) == ["0"]
