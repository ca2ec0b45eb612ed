"""Comparisons: which models are trained at a budget, and with which options."""

import dataclasses
from typing import Any

import pytest
import torch

from einlinear_lab.models import GPTConfig, MLPConfig, Shape
from einlinear_lab.runs.run import Run
from einlinear_lab.sweeps.compare import PRESETS, CompareConfig, configure, plan, widest

OPTIONS: dict[str, Any] = {"data": "digits", "batch_size": 128, "depth": 1}
SHAPE = Shape(64, 10, (1, 8, 8))  # of the digits


def macs(structure: str, width: int, depth: int = 1) -> int:
    with torch.device("meta"):
        return MLPConfig(structure=structure, width=width, depth=depth).build(SHAPE).macs


# Budgets


@pytest.mark.parametrize("spec", ["dense", "btt", "monarch", "low_rank"])
@pytest.mark.parametrize("budget", [20_000, 100_000])
def test_the_widest_model_within_the_budget(spec: str, budget: int) -> None:
    width = widest(spec, lambda width: MLPConfig(structure=spec, width=width, depth=2).build(SHAPE), budget)
    assert macs(spec, width, 2) <= budget
    assert all(macs(spec, wider, 2) > budget for wider in range(width + 16, 2 * width + 16, 16))


def test_a_budget_that_is_too_small_says_what_the_cheapest_model_takes() -> None:
    with pytest.raises(ValueError, match=r"btt: 100 MACs are too few, the cheapest model takes \d"):
        widest("btt", lambda width: MLPConfig(structure="btt", width=width, depth=2).build(SHAPE), 100)


def test_only_widths_that_do_not_fit_are_passed_over() -> None:
    sentences = Shape(64, 64, context=8)
    assert widest("dense", lambda width: GPTConfig(width=width, d_head=48, depth=1).build(sentences), 100_000) % 48 == 0
    tried = []
    with pytest.raises(ValueError, match="unknown family 'bttt'"):
        widest(
            "bttt",
            lambda width: (tried.append(width), MLPConfig(structure="bttt", width=width).build(SHAPE))[1],
            10_000,
        )
    assert tried == [16]


# Plans


def models(runs: tuple[Run, ...], seed: int = 0) -> list[tuple[str, int]]:
    return [(run.model.structure, run.model.width) for run in runs if run.seed == seed]


def test_plan_matches_compute_and_lets_dense_reach_further() -> None:
    config = CompareConfig(structures=("btt", "dense"), macs=(40_000, 20_000), seeds=2, dense_reach=2, options=OPTIONS)
    runs = plan(config).runs
    assert [run.seed for run in runs] == [0] * 5 + [1] * 5
    assert [structure for structure, _ in models(runs)] == ["btt", "dense", "btt", "dense", "dense"]
    sizes = [macs(*model) for model in models(runs)]
    assert all(0.5 * limit < size <= limit for size, limit in zip(sizes, (20e3, 20e3, 40e3, 40e3, 80e3), strict=True))


def test_plan_by_widths_has_each_model_once_and_canonical_specs() -> None:
    config = CompareConfig(
        structures=("btt(rank=1)", "btt", "monarch( blocks = 2 )"), widths=(32, 16, 32), options=OPTIONS
    )
    assert models(plan(config).runs) == [
        ("btt", 16),
        ("monarch(blocks=2)", 16),
        ("btt", 32),
        ("monarch(blocks=2)", 32),
    ]


def test_epochs_become_steps_of_the_training_images() -> None:
    of_epochs = plan(CompareConfig(structures=("dense",), widths=(16,), epochs=3, options=OPTIONS)).runs[0]
    assert of_epochs.training.steps == 3 * (1438 // 128)
    of_steps = plan(CompareConfig(structures=("dense",), widths=(16,), options=OPTIONS | {"steps": 7})).runs[0]
    assert of_steps.training.steps == 7
    warm = plan(
        CompareConfig(structures=("dense",), widths=(16,), options=OPTIONS | {"warmup": 100, "densify_at": 150})
    )
    assert (warm.runs[0].training.warmup, warm.runs[0].training.steps) == (100, 20 * (1438 // 128))
    with pytest.raises(ValueError, match="warmup must be from 0 to below the 220 steps, not 300"):
        plan(CompareConfig(structures=("dense",), widths=(16,), options=OPTIONS | {"warmup": 300}))
    with pytest.raises(ValueError, match="data=teacher has no epochs: give steps"):
        plan(CompareConfig(structures=("dense",), widths=(16,), options={"data": "teacher", "teacher_width": 8}))


def test_losses_over_time_need_evaluations() -> None:
    def every(**options: Any) -> int | None:
        config = CompareConfig(structures=("dense",), widths=(16,), options=OPTIONS | options, interleave=True)
        return plan(config).runs[0].training.evaluate_every

    assert every(steps=400) == 10
    assert every(steps=7) == 1
    assert every(steps=400, evaluate_every=100) == 100
    assert every() == 20 * (1438 // 128) // 40
    plain = plan(CompareConfig(structures=("dense",), widths=(16,), options=OPTIONS))
    assert plain.runs[0].training.evaluate_every is None


def test_pixels_are_permuted_for_an_mlp_alone() -> None:
    mlp, vit = (
        plan(CompareConfig(structures=("dense",), widths=(16,), options={"data": "digits", "model": model})).runs[0]
        for model in ("mlp", "vit")
    )
    assert (mlp.config["permute"], vit.config["permute"]) == (True, False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bbt", "Did you mean 'btt'"),
        ("btt(rnk=2)", "no argument 'rnk'"),
        ("(g a), g r f a, f e g r -> (f e)", "axis 'r'"),
    ],
)
def test_every_structure_is_checked_before_training(spec: str, message: str) -> None:
    for size in ({"widths": (16, 32)}, {"macs": (20_000,)}):
        with pytest.raises(ValueError, match=message):
            plan(CompareConfig(structures=("dense", spec), options=OPTIONS, **size))  # type: ignore[arg-type]


def test_options_override_the_preset_and_the_preset_the_defaults() -> None:
    config = configure("demo", epochs=7, widths=(16,), seeds=None, lr=1e-2)
    assert config.epochs == 7
    assert config.widths == (16,)
    assert config.seeds == PRESETS["demo"]["seeds"]
    assert config.options == {"lr": 1e-2}
    assert configure("demo", steps=100).options == {"steps": 100}


def test_texts_become_what_the_options_are() -> None:
    config = configure(seeds="2", dense_reach="8", lr="1e-2")
    assert (config.seeds, config.dense_reach) == (2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quick"}, "the presets are demo, paper"),
        ({"macs": (1,), "widths": (1,)}, "not both"),
        ({"epochs": 2, "steps": 9}, "give either epochs, of which the steps follow, or steps, not both"),
        ({"seeds": "two"}, "seeds should be a valid integer, .* not 'two'"),
        ({"structures": ()}, "at least one structure"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"widths": (0,)}, "widths must be positive"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"width": 64}, "width cannot be set: a comparison varies seed, structure, width"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**options)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_runs(preset: str) -> None:
    config = configure(preset, data="digits", structures=("btt",), batch_size=64)
    assert len(plan(dataclasses.replace(config, macs=config.macs[:1])).runs) == config.seeds
