"""How much errors matter: against Jacobians that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from einlinear.compression.importance import importance


class Classifier(nn.Module):
    """What a model of transformers returns, for one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> object:
        class Output:
            logits = self.second(self.first(x).tanh())

        return Output()


def test_the_mean_square_of_the_jacobian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)  # frozen ones too
    x = torch.randn(4000, 5)
    slopes = 1 - model[1](model[0](x)).square()
    jacobian = slopes[:, None] * model[2].weight  # (tokens, 3, 8)
    found = importance(model, {"0": model[0], "2": model[2]}, [x[:1000], x[1000:]])
    assert found["0"] == pytest.approx(4000 * float(jacobian.square().sum(1).mean()), rel=0.1)
    assert found["2"] == pytest.approx(4000.0, rel=0.1)
    assert not any(p.grad is not None for p in model.parameters())


def test_of_logits_the_divergence_of_the_answers() -> None:
    """E KL(p || p') of logits off by d is d^T (diag p - p p^T) d / 2."""
    torch.manual_seed(0)
    model = Classifier()
    x = 2 * torch.randn(4000, 5)
    p = model(x).logits.softmax(1).detach()  # type: ignore[attr-defined]
    found = importance(model, {"second": model.second}, [{"x": x}])
    assert found["second"] == pytest.approx(4000 * float((p - p.square()).mean()), rel=0.1)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = Classifier()
    x, mask = torch.randn(50, 4, 5), torch.ones(50, 4, dtype=torch.long)
    mask[:, 2:] = 0
    layers = {"first": model.first}
    before = importance(model, layers, [{"x": x, "attention_mask": mask}])["first"]
    x[:, 2:] = 1000.0
    assert importance(model, layers, [{"x": x, "attention_mask": mask}])["first"] == before
    x[:, 2:] = 0.0
    assert importance(model, layers, [{"x": x}])["first"] > 1.2 * before


def test_a_layer_that_few_tokens_pass_counts_for_few() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.first = nn.Linear(5, 8), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.all(x).sum(1) + self.first(x[:, 0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Pooled()
    found = importance(model, {"all": model.all, "first": model.first}, [torch.randn(200, 50, 5)])
    assert found["all"] / found["first"] == pytest.approx(50, rel=0.01)
