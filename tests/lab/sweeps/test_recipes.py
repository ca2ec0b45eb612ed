"""Recipes: every one is whole, its models can be built, and what the documentation says of it is what its file says."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data.samples import prose
from torch import nn

from einlinear.nn.linear import Factored
from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.models.config import ModelConfig, Shape
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.sweeps import recipes

DOCUMENT = Path(__file__).parents[3] / "docs" / "guides" / "recipes.md"
EVERY = [(name, scale) for name in recipes.names() for scale in recipes.SCALES]
SWEEPS = [(name, scale) for name, scale in EVERY if not getattr(recipes.load(name), scale).commands]
VOCABULARIES = {
    "data/english": 96,
    "data/openwebtext": 96,
    "data/english-bpe": 4096,
    "data/openwebtext-bpe": 50_304,
    "data/babylm": 50_272,
}
SHAPES = {
    "teacher": Shape(8, 1),
    "fashion-mnist": Shape(28 * 28, 10, (1, 28, 28)),
    "data/cifar-10": Shape(3 * 32 * 32, 10, (3, 32, 32)),
    "data/cifar-100": Shape(3 * 32 * 32, 100, (3, 32, 32)),
    "data/imagenet": Shape(3 * 224 * 224, 1000, (3, 224, 224)),
    "pixels:fashion-mnist": Shape(257, 257, context=8 * 8),
    "pixels:data/cifar-5m": Shape(257, 257, context=8 * 8 * 3),
}
# Decades of compute that the models of every structure span.
SPANS = {("image-mlp", "small"): 2, ("image-mlp", "paper"): 2.4, ("image-vit", "small"): 2, ("image-vit", "paper"): 2.6}


def shape(run: Run) -> Shape:
    """What the models of a run have to know of its data, which need not be there."""
    name = run.data.data
    if name in VOCABULARIES:
        return Shape(VOCABULARIES[name], VOCABULARIES[name], context=run.config["context"])
    return SHAPES[name]


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_it_says_what_it_is(name: str, scale: str) -> None:
    recipe = recipes.load(name)
    chosen: recipes.Scale = getattr(recipe, scale)
    assert all((recipe.title, recipe.shows, chosen.about))
    assert re.match(r"arXiv \d{4}\.\d{5}, ", recipe.source)
    assert (chosen.minutes is not None) == (scale == "small")
    if chosen.commands:
        assert not chosen.config
        assert all(command.startswith("einlinear ") for command in chosen.commands)
        assert all(re.search(r" --out [\w/-]+$", command) for command in chosen.commands)
    else:
        data = chosen.config["data"].removeprefix("pixels:")
        assert data.startswith("data/") == bool(chosen.prepare)  # what has to be put there first
        assert data in chosen.prepare or not chosen.prepare


@pytest.mark.parametrize(("name", "scale"), SWEEPS)
def test_no_run_is_there_twice(name: str, scale: str) -> None:
    chosen: recipes.Scale = getattr(recipes.load(name), scale)
    described = 0
    for part in chosen.parts:
        grid = {**chosen.grid, **part.get("grid", {})}
        lists = [values for option, values in grid.items() if option not in part.get("config", {})]
        described += len(list(itertools.product(*lists)))
    assert len(recipes.sweep(name, scale).runs) == described


@pytest.mark.parametrize(("name", "scale"), SWEEPS)
def test_its_models_can_be_built_and_span_the_compute(name: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (Factored, nn.Linear, nn.Embedding):  # to draw numbers without memory takes most of the time
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    macs: dict[str, set[int]] = {}
    whole = (name, scale) in SPANS
    for run in recipes.sweep(name, scale).runs:
        model = run.model if whole else replace(run.model, depth=1)  # all blocks are alike
        macs.setdefault(model.structure, set()).add(built(model, shape(run)))
    ratios = {structure: max(found) / min(found) for structure, found in macs.items()}
    assert all(ratio >= 10 ** SPANS.get((name, scale), 0) for ratio in ratios.values()), ratios


@lru_cache(None)
def built(model: ModelConfig, shape: Shape) -> int:
    """The MACs of a model that can be built, and so can what its learning rates refer to."""
    model.base(shape)
    with torch.device("meta"):
        return model.build(shape).macs


def tiny(tmp_path: Path) -> dict[str, Mapping[str, Any]]:
    """What turns the runs of a recipe into a single one of seconds, on data that is made here."""
    text = tmp_path / "text.txt"
    text.write_text(prose(2000), encoding="utf-8")
    prepare_tokens(TextConfig(sources=(str(text),)), tmp_path / "tokens")
    images = {"data": "digits", "width": 32, "batch_size": 8}
    sequences = {"width": 32, "batch_size": 2, "validation_tokens": 64}
    return {
        "image-mlp": images,
        "image-vit": {**images, "patch_size": 4},
        "mlp-regression": {"width": 32, "batch_size": 8, "teacher_width": 16},
        "char-gpt": {**sequences, "data": str(tmp_path / "tokens")},
        "btt-moe": {**sequences, "data": str(tmp_path / "tokens"), "experts": 4, "routed": "both"},
        "dyad": {**sequences, "data": str(tmp_path / "tokens"), "model": "pythia", "structure": "dyad"},
        "next-pixel": {**sequences, "data": "pixels:digits"},
    }


@pytest.mark.parametrize(
    "name", ["image-mlp", "image-vit", "mlp-regression", "char-gpt", "btt-moe", "next-pixel", "dyad"]
)
def test_its_settings_train(name: str, tmp_path: Path) -> None:
    overrides = {"structure": "btt", "steps": 3, "warmup": 0, "evaluate_every": 2, **tiny(tmp_path)[name]}
    run, *_ = recipes.sweep(name, "small", overrides).runs
    result = execute(run, tmp_path / "run")
    assert result.steps == 3
    assert not result.diverged
    small = recipes.load(name).small
    assert run.model.NAME in small.grid.get("model", [small.config.get("model")])


def test_overrides_replace_the_settings() -> None:
    runs = recipes.sweep("lr-transfer", "small", {"lr": "1e-2", "width": 64, "seed": 5}).runs
    assert {(run.training.lr, run.model.width, run.seed) for run in runs} == {(1e-2, 64, 5)}
    assert len(runs) == 5  # one of each structure, and the control


@pytest.mark.parametrize("name", ["runs.yaml", "folder/runs", "runs.TOML"])
def test_files_of_other_kinds_are_refused_as_files(name: str) -> None:
    with pytest.raises(ValueError, match=r"is neither a recipe nor a \.toml or \.json file\. The recipes are btt-moe"):
        recipes.load(name)


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown recipe 'char_gpt'\. Did you mean 'char-gpt'\? The recipes are btt-moe, char-gpt,"
    ):
        recipes.load("char_gpt")
    with pytest.raises(ValueError, match="scale must be small or paper, not 'large'"):
        recipes.sweep("char-gpt", "large")
    with pytest.raises(ValueError, match=r"feature-updates is no sweep; its figure is made by: einlinear coord-check"):
        recipes.sweep("feature-updates")
    with pytest.raises(ValueError, match=r"a run of model=mlp .* has no option 'patch_size'"):
        recipes.sweep("lr-transfer", "small", {"patch_size": 4})


def test_a_file_with_unknown_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 'title = "t"\nsource = "s"\nshows = "w"\n[small]\nabout = "a"\n[paper]\nabout = "a"\n'
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    for name, text, message in (
        ("top", f"author = 1\n{whole}", "top has no option 'author'"),
        ("scale", f"{whole}minute = 3\n", "paper of scale has no option 'minute'. Did you mean 'minutes'"),
        ("damaged", f"{whole}[", "damaged.toml cannot be read"),
        ("part", whole.replace("[paper]", "parts = [{ grids = {} }]\n[paper]"), "a part of part .small. has no option"),
    ):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            recipes.sweep(name)
    assert recipes.names() == ("damaged", "part", "scale", "top")


def test_the_documentation_says_what_the_files_say() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.rsplit(" | ", 1)[0] for row in rows] == [_row(name) for name in recipes.names()]


def _row(name: str) -> str:
    recipe = recipes.load(name)
    counts = [
        "a command" if scale.commands else f"{len(recipes.sweep(name, which).runs)} runs"
        for which, scale in zip(recipes.SCALES, (recipe.small, recipe.paper), strict=True)
    ]
    shows = " ".join(recipe.shows.split())
    return f"| `{name}` | {shows} | {counts[0]}, {recipe.small.minutes} minutes | {counts[1]}"
