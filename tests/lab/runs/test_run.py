"""Runs: options in and out, models and data of every kind, what a run measures, and its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.models import MODELS, Shape
from einlinear_lab.runs.data_config import ImageDataConfig
from einlinear_lab.runs.execution import LAST, execute
from einlinear_lab.runs.records import read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.training import metrics

QUICK: dict[str, Any] = {"data": "digits", "width": 16, "depth": 1, "batch_size": 128, "steps": 12, "threads": 1}


def run(**options: Any) -> Run:
    return Run.of(QUICK | options)


# Options


def test_options_are_typed_and_read_back() -> None:
    made = run(model="vit", structure="btt(rank=2)", lr="1e-2", clip="none", betas=[0.9, 0.99], heads="2", patch_size=2)
    assert (made.training.lr, made.training.clip, made.training.betas) == (0.01, None, (0.9, 0.99))
    assert run(betas="0.9, 0.99").training.betas == (0.9, 0.99)
    assert made.config["model"] == "vit"
    assert made.config["heads"] == 2
    assert Run.of(json.loads(json.dumps(made.config))) == made


def test_the_key_is_that_of_what_can_change_the_result() -> None:
    plain = run()
    assert run(threads=2, log_every=3, checkpoint_every=5, tracker="wandb", parallel="fsdp").key == plain.key
    assert run(routed="both", active=3).key == plain.key
    assert run(experts=4, routed="both").key != run(experts=4).key
    others = [run(lr=1e-2), run(seed=1), run(structure="btt"), run(permute=True), run(base_width=32)]
    assert len({plain.key, *(other.key for other in others)}) == 6
    assert run(structure="a i, b a -> b i").name != run(structure="a i,b a->b i").name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "cnn"}, "model must be mlp, vit, gpt, opt, pythia, not 'cnn'"),
        ({"wdith": 64}, r"a run of model=mlp on data=digits \(images\) has no option 'wdith'\. Did you mean 'width'\?"),
        ({"heads": 2}, "has no option 'heads'"),
        ({"context": 64}, "has no option 'context'"),
        ({"data_kind": "audio"}, "data_kind must be images, text, pixels, teacher, not 'audio'"),
        ({"lr": "fast"}, "lr should be a valid number, unable to parse string as a number, not 'fast'"),
        ({"betas": "0.9,fast"}, "betas.1 should be a valid number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"steps": None}, "steps should be a valid integer, not None"),
        ({"mixup": 2.0}, "mixup must lie between 0 and 1"),
        ({"mixup": 0.5, "augment": False}, "mixup=0.5 needs augment=true"),
        ({"schedule": "square"}, "schedule must be constant or cosine or linear"),
        ({"seed": -1}, "seed must be from 0"),
        ({"accumulate": 3}, "accumulate=3 does not divide the batch_size of 128"),
        ({"densify_at": 5, "experts": 4}, "mixtures of experts cannot be made"),
        ({"guide_until": 5, "experts": 4}, "a dense guide, which mixtures of experts cannot have"),
        ({"device": "tpu"}, "device must be cpu or cuda"),
        ({"model": "opt", "experts": 4}, "model=opt has no mixtures of experts"),
        (
            {"model": "pythia", "qk_norm": True},
            r"a run of model=pythia on data=digits \(text\) has no option 'qk_norm'",
        ),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_steps_must_be_given() -> None:
    with pytest.raises(ValueError, match="steps must be given"):
        Run.of({"data": "digits"})


@pytest.mark.parametrize(
    ("model", "shape"),
    [("mlp", Shape(9, 9, context=8)), *((model, Shape(8, 1)) for model in ("vit", "gpt", "opt", "pythia"))],
)
def test_models_say_which_data_they_take(model: str, shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"takes .*model=|takes .* prepare"):
        MODELS[model]().build(shape)


def test_the_base_model_is_dense_whatever_the_structure() -> None:
    made = MODELS["gpt"](structure="btt", head_structure="btt", width=128, base_expansion=1)  # type: ignore[call-arg]
    base = made.base(Shape(10, 10, context=4))
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    assert shapes["head.A"] == (10, 64)
    assert shapes["blocks.0.feed_forward.fc1.A"] == (64, 64)
    assert all(p.is_meta for p in base.parameters())


# What a run does


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "lines.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(3000)))
    prepare_tokens(TextConfig(sources=(str(folder / "lines.txt"),)), folder / "tokens")
    return folder / "tokens"


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        ({"model": "mlp", "permute": True, "mixup": 0.5, "label_smoothing": 0.1}, "train_error"),
        ({"model": "vit", "patch_size": 4, "heads": 2, "normalize": True, "structure": "btt"}, "train_error"),
        ({"model": "gpt", "data": "TEXT", "context": 16, "d_head": 8, "structure": "btt"}, "validation_loss"),
        ({"model": "gpt", "data": "pixels:digits", "image_size": 4, "d_head": 8}, "validation_loss"),
        ({"model": "opt", "data": "TEXT", "context": 16, "structure": "dyad"}, "validation_loss"),
        ({"model": "pythia", "data": "pixels:digits", "image_size": 4, "structure": "dyad"}, "validation_loss"),
        ({"model": "mlp", "data": "teacher", "teacher_width": 16, "structure": "low_rank"}, "test_loss"),
    ],
)
def test_every_model_and_data(options: dict[str, Any], metric: str, text: Path, tmp_path: Path) -> None:
    made = run(
        **{name: str(text) if value == "TEXT" else value for name, value in options.items()} | {"base_width": 16}
    )
    result = execute(made, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert (record.run, record.result) == (made, result)
    assert record.metric == metric
    assert metric in result.metrics
    assert result.compute == result.macs * result.inputs * 12
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_is_repeatable_and_depends_on_its_seed() -> None:
    first, again, other = (execute(run(structure="btt", seed=seed)) for seed in (0, 0, 1))
    assert dataclasses.replace(again, step_seconds=first.step_seconds) == first
    assert other.train_loss != first.train_loss


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-4},
        {"schedule": "constant"},
        {"mixup": 0.8},
        {"label_smoothing": 0.2},
        {"base_width": 32},
        {"augment": False},
        {"permute": True},
        {"limit": 500},
        {"image_size": 6},
        {"structure_aware": False},
    ],
)
def test_every_setting_changes_the_result(change: dict[str, Any]) -> None:
    plain, changed = (execute(run(structure="btt", **options)).train_loss for options in ({}, change))
    assert plain != changed


def test_training_learns_and_measures_its_last_tenth(tmp_path: Path) -> None:
    losses: list[float] = []
    found = execute(run(width=64, steps=150), tmp_path, lambda step, steps, loss: losses.append(loss))
    last = round(LAST * 150)
    assert found.train_loss == pytest.approx(sum(losses[-last:]) / last)
    assert found.train_loss is not None
    assert found.train_loss < 0.5 * losses[0]
    assert found.metrics["test_accuracy"] > 0.8
    assert found.metrics["train_error"] < 0.3
    assert metrics.read(tmp_path / "metrics.jsonl")[-1]["train_error"] == found.metrics["train_error"]


def test_a_loss_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    found = execute(run(lr=1e30, steps=500), tmp_path)
    assert found.diverged
    assert (found.train_loss, found.metrics) == (None, {})
    assert found.steps < 500
    assert read_record(tmp_path).result == found


def test_pixels_are_permuted_in_all_runs_alike() -> None:
    """A batch is all of the images here: runs of two seeds see the same ones, in another order."""
    plain, one, two = (
        ImageDataConfig(data="digits", limit=50, batch_size=50, permute=permute, augment=False)
        .load(seed)
        .task.batch(0)[0]
        for permute, seed in ((False, 0), (True, 0), (True, 1))
    )
    assert plain.shape == one.shape == (50, 1, 8, 8)
    assert torch.equal(plain.flatten(1).sort(1).values, one.flatten(1).sort(1).values)
    images = [sorted(batch.flatten(1).tolist()) for batch in (plain, one, two)]
    assert images[0] != images[1]
    assert images[1] == images[2]
    assert not torch.equal(one, two)


# Its folder


def test_another_process_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(step: int, steps: int, loss: float) -> None:
        with pytest.raises(BlockingIOError, match="another process is at work"):
            execute(run(), tmp_path)

    execute(run(), tmp_path, second)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_run_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_record(tmp_path)


def test_a_run_of_an_older_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 2, "kind": "mlp"}')
    with pytest.raises(ValueError, match=r"format 2 of another version of einlinear, .* reads formats 3 and 4"):
        read_record(tmp_path)


def test_a_run_of_format_3_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    execute(run(), folder)
    config, result = json.loads((folder / "run.json").read_text()), json.loads((folder / "result.json").read_text())
    renamed = {"data_digest": "digest", "data_source": "source", "metric": "error", "config": "options"}
    older = {renamed.get(name, name): value for name, value in config.items()} | {"format": 3}
    (tmp_path / "run.json").write_text(json.dumps(older))
    (tmp_path / "result.json").write_text(json.dumps({**result, "error": result["metrics"]["train_error"]}))
    record, expected = read_record(tmp_path), read_record(folder)
    assert record.metric == "train_error"
    assert (record.run, record.result, record.data_digest) == (expected.run, expected.result, expected.data_digest)


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    for first in (run(), run(lr=1e30)):  # one that diverges leaves no checkpoint
        folder = tmp_path / first.key
        execute(first, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match=r"holds a run with another config: .*width was 16, now 64.* Name another"):
            execute(run(width=64), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        assert read_record(folder).run == first


def test_a_run_of_a_gpu_can_be_read_without_one(tmp_path: Path) -> None:
    execute(run(), tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert read_record(tmp_path).run.training.device == "cuda"
    with pytest.raises(ValueError, match="this torch finds no CUDA device"):
        execute(run(device="cuda", seed=1), tmp_path / "other")


def test_what_is_made_dense_costs_what_it_is(tmp_path: Path) -> None:
    sparse, dense = (execute(run(structure=name)) for name in ("btt", "dense"))
    both = execute(run(structure="btt", densify_at=8))
    assert (both.macs, both.params) == (dense.macs, dense.params)
    assert both.compute == sparse.inputs * (8 * sparse.macs + 4 * dense.macs)


def test_guides_are_counted_as_long_as_they_are_there() -> None:
    sparse, dense = (execute(run(structure=name)) for name in ("btt", "dense"))
    guides = dense.macs - 16 * 10  # the head is no structured layer
    found = execute(run(structure="btt", guide_until=5))
    assert (found.macs, found.params, found.guide_macs) == (sparse.macs, sparse.params, guides)
    assert found.compute == found.inputs * (12 * sparse.macs + 5 * guides)
    both = execute(run(structure="btt", guide_until=5, densify_at=8))
    assert (both.macs, both.params) == (dense.macs, dense.params)
    assert both.compute == found.inputs * (8 * sparse.macs + 5 * guides + 4 * dense.macs)
    early = execute(run(structure="btt", guide_until=5, lr=1e30))  # ends with a loss that is not finite
    assert early.diverged
    assert early.steps < 5
    assert (early.macs, early.params) == (sparse.macs, sparse.params)
    assert early.compute == early.inputs * early.steps * (sparse.macs + guides)


def test_only_another_thread_count_or_pace_continues_a_run(tmp_path: Path) -> None:
    execute(run(checkpoint_every=4), tmp_path, keep_checkpoints=True)
    (tmp_path / "result.json").unlink()
    steps: list[int] = []
    other = run(checkpoint_every=6, log_every=1, threads=2)
    execute(other, tmp_path, lambda step, *_: steps.append(step), keep_checkpoints=True)
    assert steps == []  # there are none left to do
    with pytest.raises(ValueError, match=r"holds a run with another config: lr was 0.003, now 0.01"):
        execute(run(lr=1e-2), tmp_path)
