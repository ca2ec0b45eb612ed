"""The coordinate check, on random data: it must pass with the structure-aware rule and fail with the dense one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear_lab.models import ResidualMLP

WIDTHS = (64, 1024)


def updates(structure: str, structure_aware: bool, **options: Any) -> dict[int, float]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 48), torch.randint(10, (256,))

    def build(width: int) -> ResidualMLP:
        torch.manual_seed(width)
        return el.init_(
            ResidualMLP(48, width, 10, depth=1, structure=structure, bias=False), base=None, zero=ResidualMLP.ZERO
        )

    found = el.coord_check(
        build,
        WIDTHS,
        [(x, y)],
        x[:64],
        lr=options.pop("lr", 3e-3),
        base=ResidualMLP(48, 64, 10, depth=1, bias=False),
        layers="blocks.0",
        steps=20,
        lr_scale={"input": 0.1},
        structure_aware=structure_aware,
        **options,
    )
    assert [(c.width, c.layer) for c in found] == [(width, "blocks.0") for width in WIDTHS]
    assert all(c.size > 0 for c in found)
    return {c.width: c.relative_update for c in found}


def test_relative_updates_are_independent_of_width_with_the_structure_aware_rule_only() -> None:
    aware, control = updates("btt", True), updates("btt", False)
    assert max(aware.values()) / min(aware.values()) < 1.5
    assert control[64] / control[1024] > 3


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 3e-3), ("sgd", 0.1), ("muon", 1e-2)])
@pytest.mark.parametrize("structure", ["btt(rank=2)", "monarch(blocks=4)", "low_rank", "kronecker"])
def test_every_family_and_optimizer(structure: str, optimizer: str, lr: float) -> None:
    found = updates(structure, True, optimizer=optimizer, lr=lr)
    # without correction, SGD moves wide BTT and Kronecker layers 2.5 to 5 times less
    assert max(found.values()) / min(found.values()) < 1.8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on torch.compile
def test_layers_of_wrapped_models_are_found() -> None:
    def build(width: int) -> Any:
        return torch.compile(Noisy(width), backend="eager")

    (found,) = el.coord_check(build, [16], [BATCH], BATCH[0], lr=1e-3, base=None, layers="fc", steps=1)
    assert found.layer == "fc"


class Noisy(nn.Module):
    """Half of the features are dropped in training; `flat` gives a single number for every input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(8, width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)
        self.flat = nn.Flatten(0)
        self.unused = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.fc(x))
        self.flat(h)
        y: Tensor = self.head(h)
        return y


BATCH = (torch.randn(64, 8), torch.randint(3, (64,)))


def check(**arguments: Any) -> list[el.mup.Coordinates]:
    settings: dict[str, Any] = {"lr": 1e-6, "base": None, "layers": "drop", "steps": 2}
    return el.coord_check(Noisy, [16], [BATCH], BATCH[0], **settings | arguments)


def test_dropout_does_not_count_as_a_change() -> None:
    (found,) = check()
    assert found.relative_update < 1e-3  # a step of 1e-6; two draws of dropout differ by about as much as the features
    model = Noisy(16)
    model.fc.eval()
    el.coord_check(lambda width: model, [16], [BATCH], BATCH[0], lr=1e-6, base=None, layers=["fc", "drop"], steps=1)
    assert (model.training, model.drop.training, model.fc.training) == (True, True, False)


def test_no_weight_decay_by_default() -> None:
    plain, decayed = check(lr=1e-2, layers="fc")[0], check(lr=1e-2, layers="fc", weight_decay=50.0)[0]
    assert decayed.size < 0.8 * plain.size


def test_custom_loss() -> None:
    def no_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0 * model(batch[0]).sum()

    def of_weights(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        weight: Tensor = model.get_parameter("fc.weight")
        return weight.square().sum()

    assert check(lr=1e-2, layers="fc", loss=no_loss)[0].update == 0
    assert check(lr=1e-2, layers="fc", loss=of_weights)[0].relative_update > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "dorp"}, "layers: 'dorp' matches no module; the nearest are drop, "),
        ({"layers": ["drop", "dorp"]}, "layers: 'dorp' matches no module"),
        ({"layers": "flat"}, r"layers: flat has an output of shape \(1024,\); it must be \(\.\.\., features\)"),
        ({"layers": "unused"}, "layers: none of unused was called and returned a tensor"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of adam, adamw, sgd, muon, not 'lbfgs'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**arguments)


def test_no_batches_raise() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        el.coord_check(Noisy, [16], [], BATCH[0], lr=1e-3, base=None)


def test_updates_over_depth() -> None:
    """With alpha = 1, branches of deep models learn as those of shallow ones; without a multiplier they add up."""

    def build(depth: int, base_depth: int | None = 2) -> nn.Module:
        torch.manual_seed(0)
        config: dict[str, Any] = {"structure": "btt", "base_depth": base_depth}
        model = ResidualMLP(48, 64, 10, depth=depth, bias=False, **config)
        return el.init_(model, zero=model.ZERO)

    batches = [(torch.randn(128, 48), torch.randint(10, (128,))) for _ in range(4)]
    options: dict[str, Any] = {"lr": 3e-3, "base": ResidualMLP(48, 64, 10, depth=2, bias=False), "steps": 8}

    def growth(build: Any) -> float:
        shallow, deep = el.coord_check(build, [2, 16], batches, batches[0][0], layers="norm", **options)
        return deep.update / shallow.update

    # the norm reads the last block
    assert growth(partial(build, base_depth=2)) == pytest.approx(1, abs=0.25)
    assert growth(partial(build, base_depth=None)) > 3
