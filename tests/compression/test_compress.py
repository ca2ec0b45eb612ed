"""Models made smaller: within the budget, outputs kept, mistakes named and nothing lost."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import einlinear as el
from einlinear.compression import compress


def trained(widths: tuple[int, ...] = (24, 48, 48, 24), bias: bool = True) -> nn.Sequential:
    """Weights with the decaying spectra of trained ones."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out, bias=bias)
        u, s, v = torch.linalg.svd(torch.randn(fan_out, fan_in), full_matrices=False)
        linear.weight.data = 2 * (u * torch.arange(1, len(s) + 1) ** -0.7) @ v
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def inputs(tokens: int = 2000, features: int = 24, seed: int = 1) -> Tensor:
    """Directions that differ a hundredfold in variance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(features, features, generator=torch.Generator().manual_seed(9)))[0]
    return torch.randn(tokens, features, generator=generator) * torch.logspace(-1, 1, features) @ mix + 0.5


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    right = model(x)
    return float((other(x) - right).square().sum() / (right - right.mean(0)).square().sum())


@pytest.mark.parametrize("count", ["params", "macs"])
@pytest.mark.parametrize("structures", [["low_rank"], ["monarch"], ["btt"], ["low_rank", "monarch", "btt", "tt"]])
@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_the_budget_is_kept_and_nearly_used(budget: float, structures: list[str], count: str) -> None:
    model = trained()
    report = compress(model, budget, structures, [inputs()], count=count)
    own = [module for module in model if not isinstance(module, nn.Tanh)]
    kept = sum(
        getattr(layer.structure, count) if isinstance(layer, el.Linear) else layer.in_features * layer.out_features
        for layer in own
    )
    assert kept == getattr(report, count)
    assert 0.7 * budget < kept / report.params_before <= budget
    assert model(inputs(7)).shape == (7, 24)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_known_of_the_inputs_pays(bias: bool) -> None:
    model, x = trained(bias=bias), inputs(seed=2)
    errors = {}
    for how, calibration, sequential in (
        ("plain", None, False),
        ("aware", [inputs()], False),
        ("in turn", [inputs()], True),
    ):
        smaller = copy.deepcopy(model)
        compress(smaller, 0.5, ["low_rank", "monarch"], calibration, sequential=sequential)
        errors[how] = distance(model, smaller, x)
    assert errors["aware"] < 0.5 * errors["plain"]
    assert errors["in turn"] < errors["aware"]


def test_errors_are_what_the_report_says() -> None:
    model, x = trained((24, 24)), inputs()
    original = copy.deepcopy(model)
    report = compress(model, 0.5, ["btt"], [x[:500], x[500:]])
    (layer,) = report.layers
    assert layer.error == pytest.approx(distance(original, model, x), rel=1e-3)
    assert layer.expected_error == pytest.approx(layer.error, rel=0.5)
    assert layer.speed_up.by_tokens[256] > 0
    assert "all of them" in str(report)
    assert layer.structure in str(report)


def test_too_few_tokens_are_told_of() -> None:
    for tokens, said in ((2000, False), (240, True)):
        report = compress(trained((24, 48, 24)), 0.5, ["low_rank"], [inputs(tokens // 2), inputs(tokens // 2, seed=2)])
        assert [layer.tokens_per_input for layer in report.layers] == [tokens / 24, tokens / 48]
        assert ("fitted to fewer than 10 tokens for each of their inputs" in str(report)) is said
    assert "1 of 2 layers were fitted to fewer than 10 tokens for each of their inputs (5 at worst)" in str(report)
    report = compress(trained((24, 48, 24)), 0.5, ["low_rank"])
    assert [layer.tokens_per_input for layer in report.layers] == [None, None]
    assert "tokens for each" not in str(report)


def test_a_budget_of_everything_changes_nothing() -> None:
    model = trained()
    before = copy.deepcopy(model)
    report = compress(model, 1.0, ["low_rank"], [inputs()])
    assert {layer.structure for layer in report.layers} == {"dense"}
    assert distance(before, model, inputs()) == 0


def test_more_families_are_no_worse() -> None:
    errors = {}
    for families in (("low_rank",), ("monarch",), ("btt",), ("low_rank", "monarch", "btt")):
        model = trained()
        report = compress(model, 0.5, families, [inputs()])
        errors[families] = sum(layer.expected_error * layer.sensitivity for layer in report.layers)
    *single, mixed = errors.values()
    assert mixed <= min(single) * (1 + 1e-3)


def test_what_matters_little_pays_for_what_matters() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = trained((24, 24))[0], trained((24, 24))[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)  # type: ignore[no-any-return]

    report = compress(Branches(), 0.5, ["low_rank"], [inputs()])
    loud, quiet = report.layers
    assert loud.params > 1.5 * quiet.params
    assert loud.error < 0.5 * quiet.error


def test_padding_is_not_seen() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = trained()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.body(x)  # type: ignore[no-any-return]

    results = []
    for padding in (0.0, 1000.0, torch.nan):
        model, x = Masked(), inputs(400).view(40, 10, 24).clone()
        mask = torch.ones(40, 10, dtype=torch.long)
        mask[:, 7:] = 0
        x[mask == 0] = padding
        compress(model, 0.5, ["low_rank"], [{"x": x, "attention_mask": mask}])
        results.append(model(inputs(5), mask))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


@pytest.mark.parametrize(
    "x",
    [inputs()[:1], inputs()[:1].expand(50, -1), inputs() + 1e4, 1e-15 * inputs(), 1e12 * inputs()],
    ids=["one token", "constant", "far from zero", "tiny", "huge"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_say_little(x: Tensor, bias: bool) -> None:
    model = nn.Sequential(*[layer for layer in trained(bias=bias) if isinstance(layer, nn.Linear)])
    right = model(x).detach()
    report = compress(model, 0.5, ["low_rank", "btt"], [x])
    assert report.params <= 0.5 * report.params_before
    found = model(x).detach()
    assert bool(found.isfinite().all())
    assert float((found - right).norm()) <= 0.5 * float(right.norm())


class Routed(nn.Module):
    """Two experts, of which what the layer before says chooses one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = trained((24, 24))[0], nn.ModuleList([trained((24, 24))[0] for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for number, expert in enumerate(self.experts):
            mine = (y[:, 0] > 0) == bool(number)
            if mine.any():
                y = y.index_put((mine,), expert(y[mine]))
        return y


def test_experts_that_are_chosen_by_the_data() -> None:
    model, x = Routed(), inputs()
    # the compressed first layer sends other tokens to the experts, which are then fitted to the original's inputs
    compressed, right = copy.deepcopy(model), model(x).detach()
    report = compress(compressed, 0.5, ["low_rank"], [x])
    assert {layer.name for layer in report.layers} == {"first", "experts.0", "experts.1"}
    parallel = copy.deepcopy(model)
    compress(parallel, 0.5, ["low_rank"], [x], sequential=False)
    for expert, other in zip(compressed.experts, parallel.experts, strict=True):
        torch.testing.assert_close(expert.dense_weight(), other.dense_weight(), atol=1e-4, rtol=1e-4)
    assert float((compressed(x).detach() - right).norm()) < float(right.norm())
    chosen = (model.first(x)[:, 0] > 0).detach()
    batches = [x[chosen], x[~chosen]]  # the first reaches one expert only
    report = compress(model, 0.5, ["low_rank"], batches, sequential=False)
    assert {layer.name for layer in report.layers} == {"first", "experts.0", "experts.1"}


@pytest.mark.parametrize("budget", [0.08, 0.9])
def test_small_and_large_budgets(budget: float) -> None:
    report = compress(trained((64, 64, 64)), budget, ["low_rank"], [inputs(features=64)])
    assert 0.7 * budget * report.params_before < report.params <= budget * report.params_before
    complete = compress(trained((64, 64)), 0.8, ["low_rank(rank=24)"], [inputs(features=64)])
    assert complete.layers[0].structure == "low_rank(rank=24)"


def test_activations_in_place_and_frozen_models() -> None:
    results = []
    for in_place in (False, True):
        model = nn.Sequential(trained((24, 48))[0], nn.ReLU(inplace=in_place), trained((48, 24))[0])
        report = compress(model.requires_grad_(False), 0.5, ["low_rank"], [inputs()])
        results.append([(layer.structure, layer.sensitivity) for layer in report.layers])
    assert results[0] == results[1]


def test_residuals_in_place() -> None:
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layers, self.in_place = trained((24, 24, 24)), in_place

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            for layer in self.layers:
                y = layer(x)
                x = x.add_(y) if self.in_place else x + y
            return x

    for sequential in (True, False):
        errors = []
        for in_place in (False, True):
            model = Residual(in_place)
            report = compress(model, 0.5, ["low_rank"], [inputs()], sequential=sequential)
            errors.append([(layer.structure, layer.expected_error, layer.error) for layer in report.layers])
        assert errors[0] == errors[1]


def test_models_that_are_compiled() -> None:
    model = trained()
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(inputs())
    layers = [compress(which, 0.5, ["low_rank"], [inputs()]).layers for which in (model, compiled)]
    assert [layer.structure for layer in layers[0]] == [layer.structure for layer in layers[1]]


def test_layers_that_are_shared_tied_or_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(24, 24)
            self.body = trained((24, 24, 24))
            self.again = self.body[0]
            self.unused = nn.Linear(24, 24)
            self.tied = nn.Linear(24, 24, bias=False)
            self.tied.weight = self.embedding.weight
            self.head = nn.Linear(24, 24)
            self.beside = nn.Linear(24, 24)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            self.beside(x)
            return self.head(self.tied(self.again(self.body(x))))  # type: ignore[no-any-return]

    model = Odd()
    report = compress(model, 0.5, ["low_rank"], [inputs()])
    assert model.again is model.body[0]
    assert isinstance(model.again, el.Linear)
    assert {layer.name for layer in report.layers} == {"body.0", "body.2"}
    reasons = dict(report.skipped)
    assert "tied to embedding" in reasons["tied"]
    assert "never called" in reasons["unused"]
    assert "output head" in reasons["head"]
    assert "no gradient from the model's output" in reasons["beside"]
    assert "Left as it was: tied has its weight tied to embedding." in str(report)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    compress(model, 0.5, ["low_rank"], [inputs()], layers="head")
    assert isinstance(model.head, el.Linear)


def test_the_last_layer_of_a_classifier_is_compressed_only_if_it_is_named() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=20)
    model = transformers.ViTForImageClassification(config)
    images = [torch.randn(8, 3, 16, 16)]
    assert dict(compress(copy.deepcopy(model), 0.6, ["low_rank"], images).skipped) == {
        "classifier": "is the output head: name it in layers to compress it"
    }
    named = compress(model, 0.6, ["low_rank"], images, layers="classifier")
    assert [layer.name for layer in named.layers] == ["classifier"]


def test_modes_dtype_and_frozen_layers_are_kept() -> None:
    model = trained().to(torch.bfloat16)
    model[0].requires_grad_(False)
    model[2].eval()
    compress(model, 0.3, ["low_rank"], [inputs().to(torch.bfloat16)])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model[0].parameters())
    assert [module.training for module in model] == [True, True, False, True, True]


def test_it_goes_on_after_an_interruption(tmp_path: Path) -> None:
    expected = trained()
    compress(expected, 0.5, ["low_rank", "monarch"], [inputs()])
    steps: list[tuple[str, int]] = []

    def until(what: str, done: int) -> Any:
        def tell(now: str, count: int, of: int) -> None:
            steps.append((now, count))
            if (now, count) == (what, done):
                raise KeyboardInterrupt

        return tell

    for what, done in (("comparing structures", 2), ("fitting", 1), ("fitting", 2)):
        model = trained()
        with pytest.raises(KeyboardInterrupt):
            compress(model, 0.5, ["low_rank", "monarch"], [inputs()], cache_dir=tmp_path, progress=until(what, done))
        assert not any(isinstance(module, el.Linear) for module in model)
    steps.clear()
    report = compress(model, 0.5, ["low_rank", "monarch"], [inputs()], cache_dir=tmp_path, progress=until("nothing", 0))
    assert {layer.tokens_per_input for layer in report.layers} == {2000 / 24, 2000 / 48}
    assert next(step for step in steps if step[0] == "comparing structures")[1] == 3  # nothing is compared twice
    assert torch.equal(model(inputs(9)), expected(inputs(9)))
    with pytest.raises(
        ValueError, match=r"holds an unfinished compression with another config \(budget\): repeat that config"
    ):
        compress(trained(), 0.4, ["low_rank", "monarch"], [inputs()], cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"with another config \(model and data\)"):
        compress(trained(), 0.5, ["low_rank", "monarch"], [2 * inputs()], cache_dir=tmp_path)
    with torch.no_grad():
        model = trained()
        model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"with another config \(model and data\)"):
        compress(model, 0.5, ["low_rank", "monarch"], [inputs()], cache_dir=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds files that are not an unfinished compression"):
        compress(trained(), 0.5, ["low_rank", "monarch"], [inputs()], cache_dir=tmp_path)


@pytest.mark.parametrize("count", ["params", "bytes"])
def test_the_global_generator_is_left_alone(count: str) -> None:
    state, results = torch.get_rng_state(), []
    for seed in (1, 2):
        model = trained()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        compress(model, 0.5, ["low_rank", "monarch"], [inputs()], count=count)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model(inputs()))
    assert torch.equal(*results)
    torch.set_rng_state(state)


def test_progress_from_the_first_second() -> None:
    """Before anything is computed, then batch by batch, then layer by layer."""
    calls: list[tuple[str, int, int]] = []
    passes: list[int] = []
    model = trained()
    model[0].register_forward_pre_hook(lambda *_: passes.append(len(calls)))
    model[2].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no dense linear layer"):
        compress(nn.Sequential(model[0]), 0.5, ["low_rank"], [inputs()], progress=lambda *call: calls.append(call))
    assert passes
    assert min(passes) >= 1
    calls.clear()
    compress(trained(), 0.5, ["low_rank"], [inputs(200), inputs(200)], progress=lambda *call: calls.append(call))
    assert calls[0] == ("looking at the model", 0, 1)
    assert [call for call in calls if call[0] == "collecting inputs"][:2] == [
        ("collecting inputs", 0, 2),
        ("collecting inputs", 1, 2),
    ]
    order = list(dict.fromkeys(what for what, *_ in calls))
    assert order == ["looking at the model", "collecting inputs", "comparing structures", "fitting", "timing layers"]


def test_conv1d_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    before = model(**batches[0]).logits.detach()
    report = compress(model, 0.9, ["low_rank", "btt"], batches)
    assert all(layer.name.startswith("transformer.h.") for layer in report.layers)
    assert dict(report.skipped).keys() == {"lm_head"}
    after = model(**batches[0]).logits.detach()
    assert float((after - before).square().mean() / before.var()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget is the fraction of params to keep, above 0 and at most 1, not 0"),
        ({"budget": 1.5}, "above 0 and at most 1, not 1.5"),
        (
            {"budget": 0.01},
            r"0.01 of the 4,608 params of 3 layers cannot be reached with low_rank: the cheapest choice keeps 0\.\d+",
        ),
        ({"count": "flops"}, "count must be one of 'params', 'macs', 'bytes', 'time', not 'flops'"),
        ({"structures": []}, "structures is empty: name families"),
        ({"structures": ["lowrank"]}, "unknown family 'lowrank'. Did you mean 'low_rank'"),
        ({"calibration": []}, "calibration has no batches"),
        (
            {"calibration": [inputs(200), inputs(200) * torch.nan]},
            "0, batch 1 of the calibration data: its inputs have values",
        ),
        ({"layers": "nothing.*"}, "layers: 'nothing.*' matches no linear layer"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(change: dict[str, Any], message: str) -> None:
    model = trained()
    modules, state = list(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress(model, **{"budget": 0.5, "structures": ["low_rank"], "calibration": [inputs()]} | change)
    assert list(model) == modules
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model)


class Batched(Dataset[tuple[Tensor, Tensor]]):
    """With labels, as datasets of pairs have them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return inputs()[index], torch.tensor(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": trained().state_dict()}, "model must be a torch.nn.Module, not a OrderedDict"),
        ({"budget": "0.5"}, "budget must be a number, not '0.5'"),
        ({"budget": True}, "budget must be a number, not True"),
        ({"calibration": inputs()}, r"calibration must be an iterable of batches, not a Tensor: .* \[batch\]"),
        ({"calibration": {"input": inputs()}}, r"an iterable of batches, not a dict: .* \[batch\]"),
        ({"calibration": "text.txt"}, "an iterable of batches, not a str"),
        ({"calibration": 3}, "an iterable of batches, not a int"),
        ({"calibration": DataLoader(Batched(), 4)}, "too many positional arguments.* leave out labels"),
    ],
)
def test_arguments_of_the_wrong_type(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": trained(), "budget": 0.5, "calibration": [inputs()]}
    with pytest.raises(TypeError, match=message):
        compress(**arguments | change, structures="low_rank")


class TwoOutputs(nn.Module):
    """A policy, which the report of `compress` is about, and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        return self.policy(hidden), self.value(hidden)


class Answers(TwoOutputs):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0].argmax(-1)


def test_the_output_that_counts() -> None:
    x = [torch.randn(256, 16)]
    reason = "gets no gradient from the model's output (of several, only the logits or the first one counts)"
    assert ("value", reason) in compress(TwoOutputs(), 0.8, "low_rank", x).skipped
    with pytest.raises(ValueError, match=f"body {re.escape(reason)}"):
        compress(Answers(), 0.8, "low_rank", x)


def test_models_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="layers is empty: give a glob such as"):
        compress(trained(), 0.5, layers=[])
    with pytest.raises(ValueError, match="the model has no linear layer"):
        el.convert(nn.Sequential(nn.Conv2d(3, 3, 3)), "btt")
    with pytest.raises(ValueError, match="no linear layer"):
        compress(nn.Sequential(nn.Tanh()), 0.5)
    with pytest.raises(ValueError, match="the model is itself a linear layer"):
        compress(nn.Linear(8, 8), 0.5)
    with pytest.raises(ValueError, match="no dense linear layer to compress: 0 is already structured: btt"):
        compress(nn.Sequential(el.Linear(16, 16, "btt")), 0.5, calibration=[torch.randn(8, 16)])
    with pytest.raises(ValueError, match="0 is on the meta device: load the model before"):
        compress(nn.Sequential(nn.Linear(8, 8, device="meta")), 0.5)
