"""What errors of a layer do to the model's outputs: measured, against what is written out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.compression.test_passes import DATA, Model
from torch import Tensor, nn

from einlinear.compression import compress
from einlinear.compression.sensitivity import Sensitivity, SensitivityProbe


class Classifier(nn.Module):
    """What a model of transformers returns, for one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> object:
        class Output:
            logits = self.second(self.first(x).tanh())

        return Output()


def test_a_change_of_a_weight_and_a_bias() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [torch.randn(20, 5), torch.randn(30, 5), torch.randn(1000, 5)]  # the last is not run
    change, shift = 0.1 * torch.randn(8, 5), 0.1 * torch.randn(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += change
        other[0].bias += shift
        x = torch.cat(batches[:2])
        expected = float((other(x) - model(x)).square().sum() / model(x).square().sum())
    probe = SensitivityProbe(model, batches)
    assert probe.output_change(model[0], change, shift) == pytest.approx(expected, rel=1e-4)
    assert probe.output_change(model[0], 0 * change, None) == 0
    assert not model[0]._forward_hooks


def test_layers_that_few_batches_call() -> None:
    """Such as experts: batches are run until two of them call the layer, or there are no more."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.often(x)
            return y + self.rare(x) if float(x[0, 0]) > 0 else y

    model, batches = Rare(), [torch.randn(8, 5) for _ in range(6)]
    for number, batch in enumerate(batches):
        batch[0, 0] = 1.0 if number in (2, 4) else -1.0
    change = torch.randn(5, 5)
    x = torch.cat([batches[2], batches[4]])
    with torch.no_grad():
        squares = sum(float(model(batch).square().sum()) for batch in batches[:5])
    expected = float((x @ change.T).square().sum()) / squares
    assert SensitivityProbe(model, batches).output_change(model.rare, change, None) == pytest.approx(expected, rel=1e-4)


class Centred(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y - y.mean(0)


@pytest.mark.parametrize(("kind", "samples"), [(nn.Sequential, 256), (Centred, 1000)])
def test_the_first_samples_are_enough_unless_they_depend_on_others(kind: type[nn.Sequential], samples: int) -> None:
    model, x = kind(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(1000, 5)
    other, change = copy.deepcopy(model), torch.randn(8, 5)
    with torch.no_grad():
        other[0].weight += change
        y = model(x[:samples])
        expected = float((other(x[:samples]) - y).square().sum() / y.square().sum())
    assert SensitivityProbe(model, [x]).output_change(model[0], change, None) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("skips", [False, True])
def test_blocks_before_the_layer_run_once_if_no_later_one_reads_them(skips: bool) -> None:
    model, change = Model(skips=skips), torch.randn(16, 8)
    probe, layer, block = SensitivityProbe(model, DATA[:1]), model.blocks[2].up, model.blocks[0]  # type: ignore[union-attr]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[2].up.weight += change  # type: ignore[union-attr,operator]
        expected = float((other(DATA[0]) - model(DATA[0])).square().sum() / model(DATA[0]).square().sum())
    assert probe.output_change(layer, change, None) == pytest.approx(expected, rel=1e-4)
    before = block.runs
    probe.output_change(layer, change, None)
    assert block.runs == before + skips


def test_of_logits_the_divergence() -> None:
    model = Classifier()
    x, change = torch.randn(50, 5), torch.randn(3, 8)
    mask = torch.ones(10, 5, dtype=torch.long)
    mask[:, 3:] = 0
    batch = {"x": x.view(10, 5, 5), "attention_mask": mask}
    hidden = model.first(x).tanh().detach()
    before, after = (
        F.linear(hidden, w, model.second.bias).detach() for w in (model.second.weight, model.second.weight + change)
    )
    kept = mask.flatten().bool()
    p, q = before.softmax(1)[kept], after.softmax(1)[kept]
    expected = float((p * (p / q).log()).sum(1).mean())
    assert SensitivityProbe(model, [batch]).output_change(model.second, change, None) == pytest.approx(
        expected, rel=1e-4
    )


def test_larger_errors_never_count_less() -> None:
    sensitivity = Sensitivity.of([(0.4, 1.0), (0.1, 0.5), (0.2, 2.0), (0.1, 9.0)])
    found = [sensitivity.at(error) for error in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.8)]
    assert found == sorted(found)
    assert sensitivity.slope == pytest.approx(5.0)
    assert Sensitivity.of([(0.1, 0.0)]).at(0.3) == 0


class Averaging(nn.Module):
    """One layer's outputs are averaged over 50 tokens, the other's are not."""

    def __init__(self) -> None:
        super().__init__()
        self.averaged, self.kept = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.averaged(x).mean(1, keepdim=True) + self.kept(x)  # type: ignore[no-any-return]


def test_errors_that_are_averaged_away_matter_less(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Averaging()
    model.kept.load_state_dict(model.averaged.state_dict())
    report = compress(model, 0.6, ["low_rank"], [torch.randn(30, 50, 24)], shared_cache_dir=tmp_path)
    averaged, kept = sorted(report.layers, key=lambda layer: layer.name)
    assert averaged.sensitivity < kept.sensitivity / 20
    assert averaged.params < kept.params / 2


def test_outputs_that_are_not_finite_are_the_worst() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * 1e18)  # type: ignore[no-any-return]

    report = compress(Steep(), 0.6, ["low_rank"], [torch.randn(64, 24)])
    assert all(math.isfinite(layer.sensitivity) for layer in report.layers)


def test_changes_between_and_beyond_the_points() -> None:
    sensitivity = Sensitivity.of([(0.01, 1.0), (0.04, 4.0), (0.16, 64.0)])
    changes = [sensitivity.at(error) for error in (0.0, 0.001, 0.02, 0.08, 0.32)]
    assert changes == pytest.approx([0.0, 0.1, 2.0, 16.0, 128.0])
