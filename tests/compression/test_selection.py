"""Which layers are compressed by default: all but output heads, whatever the library that a model comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression import CompressionReport


class Net(nn.Module):
    """A body of linear layers and a head under some name, which `end` takes on from."""

    def __init__(self, name: str, head: nn.Module, end: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.add_module(name, head)
        self._name, self._end = name, end

    def forward(self, x: Tensor) -> Any:
        return self._end(self.get_submodule(self._name)(self.body(x)))


class OfTimm(Net):
    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self._name)


def left_alone(report: CompressionReport) -> list[str]:
    return [name for name, reason in report.skipped if "is the output head: name it in layers" in reason]


@pytest.mark.parametrize("has_data", [True, False])
@pytest.mark.parametrize(
    ("model", "head"),
    [
        (lambda: Net("fc", nn.Linear(32, 10)), "fc"),
        (lambda: Net("head", nn.Linear(32, 24)), "head"),
        (lambda: Net("classifier", nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))), "classifier.2"),
        (lambda: Net("heads", nn.Sequential(nn.Linear(32, 10))), "heads.0"),
        (lambda: OfTimm("logits", nn.Linear(32, 10)), "logits"),
    ],
)
def test_heads_by_their_names(model: Callable[[], nn.Module], head: str, has_data: bool) -> None:
    data = [torch.randn(64, 24)] if has_data else None
    report = el.compress(model(), 0.6, ["low_rank"], data)
    assert left_alone(report) == [head]
    assert {layer.name for layer in report.layers} >= {"body.0", "body.2"}
    named = el.compress(model(), 0.6, ["low_rank"], data, layers="*")
    assert head in {layer.name for layer in named.layers}
    assert left_alone(named) == []


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y,
        lambda y: y.log_softmax(1),
        lambda y: y.sigmoid().unsqueeze(0),
        lambda y: (y.view(8, 8, 10)[:, -1], y.mean()),
        lambda y: {"scores": y.double()},
        Logits,
    ],
    ids=["plain", "log_softmax", "sigmoid", "tuple", "dict", "logits"],
)
def test_heads_that_the_data_find(end: Callable[[Tensor], Any]) -> None:
    report = el.compress(Net("output", nn.Linear(32, 10), end), 0.6, ["low_rank"], [torch.randn(64, 24)])
    assert left_alone(report) == ["output"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10)),
        Net("output", nn.Linear(32, 24)),  # features to features
        Net("output", nn.Linear(32, 10), lambda y: y.relu()),
        Net("output", nn.Linear(32, 10), lambda y: y @ torch.ones(10, 4)),
        nn.Sequential(nn.ModuleDict({"fc": nn.Linear(24, 32)})["fc"], nn.Linear(32, 32)),
    ],
)
def test_models_without_a_head(model: nn.Module) -> None:
    report = el.compress(model, 0.6, ["low_rank"], [torch.randn(64, 24)])
    assert left_alone(report) == []


def test_blocks_that_have_a_layer_called_fc() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.Linear(24, 48), nn.Linear(48, 24)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.up(x).relu())  # type: ignore[no-any-return]

    report = el.compress(nn.Sequential(Block(), Block()), 0.6, ["low_rank"])
    assert len(report.layers) == 4


class Convolutional(nn.Module):
    """As a ResNet: nearly all is in convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 64, 5), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(16, 64, batch_first=True), nn.MultiheadAttention(64, 2, batch_first=True)
        self.mix = nn.Linear(64, 64)
        self.out = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return self.out(self.mix(self.attention(y, y, y)[0]).relu())  # type: ignore[no-any-return]


def test_the_share_of_the_whole_model_comes_first() -> None:
    images = [torch.randn(8, 3, 12, 12)]
    with pytest.raises(ValueError, match=r"fc is the output head.*not considered: 4,800 in convolutions \(conv\)"):
        el.compress(Convolutional(), 0.6, ["low_rank"], images)
    text = str(el.compress(Convolutional(), 0.6, ["low_rank"], images, layers="fc"))
    assert text.startswith("Warning: the layers considered hold only 11.6% of the model's parameters: 87% are in")
    report = el.compress(Recurrent(), 0.6, ["low_rank"], [torch.randn(8, 6, 16)])
    assert report.coverage is not None
    assert [layer.name for layer in report.layers] == ["mix"]
    assert left_alone(report) == ["out"]
    kinds = {other.kind: other.names for other in report.coverage.others}
    assert kinds["recurrent layers"] == ("lstm",)
    assert kinds["packed attention projections"] == ("attention.in_proj_weight",)
    assert str(report).startswith("Warning: the layers considered hold only")
    assert "attention.in_proj_weight" in str(report)
    whole = el.compress(Net("fc", nn.Linear(32, 10)), 0.6, ["low_rank"], [torch.randn(64, 24)])
    assert whole.warning is None
    assert "The layers considered hold 1,792 of the model's 2,186 parameters (82.0%)." in str(whole)
