"""The loop: what a step does, and that a run that was interrupted is the run undisturbed."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.lab.training import toy
from torch import Tensor

import einlinear as el
from einlinear import checkpoint
from einlinear.schedules import lr_factor
from einlinear_lab.training import TrainingConfig, loop, metrics
from einlinear_lab.training.distributed import World
from einlinear_lab.training.guided import Guided

KILLS = int(os.environ.get("EINLINEAR_KILLS") or 7)


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """Ctrl-C before a step of a toy run."""
    batch = toy.Toy.batch

    def stopping(self: toy.Toy, now: int) -> tuple[Tensor, Tensor]:
        if now == step:
            raise KeyboardInterrupt
        return batch(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.Toy, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_it_learns_and_says_what_happened(tmp_path: Path) -> None:
    found = toy.run(tmp_path, steps=100, log_every=10, evaluate_every=40)
    assert len(found.losses) == 100
    assert sum(found.losses[-10:]) < 0.5 * sum(found.losses[:10])
    assert not found.diverged
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(10, 101, 10))
    assert [line["step"] for line in lines if "error" in line] == [40, 80, 100]
    assert lines[-1]["error"] == found.metrics["error"]
    assert lines[0]["train_loss"] == found.losses[9]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 4, "log_every": 1, "warmup": 3, "clip": 1.0}
    options["optimizer"] = optimizer
    whole = toy.run(tmp_path / "whole", **options)
    batch = toy.Toy.batch

    with interrupted(14):
        toy.run(tmp_path / "parts", **options)
    made: list[int] = []
    monkeypatch.setattr(toy.Toy, "batch", lambda self, step: (made.append(step), batch(self, step))[1])
    parts = toy.run(tmp_path / "parts", **options)
    assert [step for step in made if step >= 0] == list(range(12, 20))
    assert parts.losses == whole.losses
    assert parts.metrics == whole.metrics
    steps = [line["step"] for line in metrics.read(tmp_path / "parts" / "metrics.jsonl") if "train_loss" in line]
    assert steps == list(range(1, 21))
    again = toy.run(tmp_path / "parts", **options)
    assert (again.losses, again.metrics) == (whole.losses, whole.metrics)


def test_the_time_to_a_loss_can_be_read_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an interruption, and whatever data and evaluation take."""
    clock = itertools.count()  # a second passes whenever it is looked at
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    batch, evaluate = toy.Toy.batch, toy.Toy.evaluate

    def slow_batch(self: toy.Toy, step: int) -> tuple[Tensor, Tensor]:
        for _ in range(50):
            next(clock)
        if step == stop:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(toy.Toy, "batch", slow_batch)
    monkeypatch.setattr(toy.Toy, "evaluate", lambda *args: next(clock) and evaluate(*args))
    options: dict[str, Any] = {"steps": 12, "checkpoint_every": 5, "log_every": 2, "evaluate_every": 3}
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, **options)
    stop = -1
    found = toy.run(tmp_path, **options)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], "error" in line) for line in lines] == [
        (step, measured) for step in range(1, 13) for measured in (False, True) if step % (3 if measured else 2) == 0
    ]
    assert all(line["training_seconds"] == line["step"] for line in lines)
    assert found.step_seconds == 1


def test_what_is_compiled_first_takes_no_training_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither at the start, nor after an interruption, nor when layers become dense."""
    compiled, loss = set[int](), toy.Toy.loss

    def compiling(self: toy.Toy, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        layer = id(next(model.parameters()))
        if layer not in compiled:
            time.sleep(0.3)
        compiled.add(layer)
        return loss(self, model, batch)

    monkeypatch.setattr(toy.Toy, "loss", compiling)
    options: dict[str, Any] = {"steps": 12, "checkpoint_every": 3, "log_every": 1, "densify_at": 9}
    with interrupted(7):
        toy.run(tmp_path, **options)
    compiled.clear()
    toy.run(tmp_path, **options)
    assert len(compiled) == 2
    assert metrics.read(tmp_path / "metrics.jsonl")[-1]["training_seconds"] < 0.3


def test_a_warm_up_has_no_effect() -> None:
    """Neither on buffers nor on random numbers nor on gradients."""

    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(F.dropout(self.norm(x)))
            return out

    def trained() -> tuple[tuple[float, ...], list[float]]:
        torch.manual_seed(0)
        model, base = Noisy(), Noisy()
        losses = loop.train(model, base, toy.Toy(), TrainingConfig(steps=4)).losses
        return losses, model.norm.get_buffer("running_mean").tolist()

    warmed = trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_warm_up", lambda *_: None)
        assert trained() == warmed


def test_trainings_take_turns_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own number of threads, the same losses as alone, and nothing left behind if it is given up."""
    alone = [toy.run(steps=6, threads=count).losses for count in (1, 2)]
    threads, found, batch = torch.get_num_threads(), list[int](), toy.Toy.batch
    monkeypatch.setattr(
        toy.Toy, "batch", lambda self, step: (found.append(torch.get_num_threads()), batch(self, step))[1]
    )
    base = toy.build(8, "dense")
    models = [toy.initialised(toy.build) for _ in range(2)]
    both = [
        loop.train_in_steps(model, base, toy.Toy(), TrainingConfig(steps=6, lr=1e-2, threads=count))
        for count, model in enumerate(models, 1)
    ]
    reports = [next(steps) for _ in range(6) for steps in both]
    assert [[loss for *_, loss in reports[i::2]] for i in range(2)] == [list(losses) for losses in alone]
    assert found == [1, 2] * 6
    outcomes = [loop.finish(steps) for steps in both]
    assert [outcome.losses for outcome in outcomes] == alone
    torch.set_num_threads(threads)
    guided = toy.initialised(toy.build)
    given_up = loop.train_in_steps(guided, base, toy.Toy(), TrainingConfig(steps=6, threads=2, guide_until=5))
    next(given_up)
    assert any(isinstance(layer, Guided) for layer in guided.modules())
    with pytest.raises(KeyboardInterrupt):
        loop.finish(given_up, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not any(isinstance(layer, Guided) for layer in guided.modules())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("sgd", 1)])
def test_the_memory_is_that_of_parameters_gradients_and_state(optimizer: str, moments: int, tmp_path: Path) -> None:
    model = toy.initialised(toy.build)
    numbers = sum(p.numel() for p in model.parameters())
    model.get_submodule("head").bias.requires_grad_(False)
    trained = numbers - 2  # the outputs of the toy
    counters = len(list(model.parameters())) - 1 if optimizer == "adamw" else 0  # of the steps of every parameter
    found = toy.run(tmp_path, model=model, steps=2, optimizer=optimizer)
    assert found.memory == 4 * (numbers + trained + moments * trained + counters)


def test_a_run_that_went_on_takes_the_memory_of_the_undisturbed(tmp_path: Path) -> None:
    whole = toy.run(tmp_path, steps=4)
    assert toy.run(tmp_path, steps=4).memory == whole.memory  # with no step left to make there are no gradients


def test_the_memory_on_a_gpu_is_the_highest_peak_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no GPU here: what torch says of one is made up."""
    peaks, calls = iter([700, 900, 800]), list[str]()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or next(peaks))
    init = loop._Run.__init__

    def on_gpu(self: Any, *args: Any) -> None:
        init(self, *args)
        self.on_gpu = True

    monkeypatch.setattr(loop._Run, "__init__", on_gpu)
    assert toy.run(steps=3, evaluate_every=1).memory == 900
    assert calls == ["reset", "read"] * 3


def test_structured_layers_become_dense_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 4, "schedule": "constant"}
    sparse = toy.run(**options)
    whole = toy.run(tmp_path / "whole", densify_at=10, **options)
    assert whole.losses[:10] == sparse.losses[:10]
    assert whole.losses[10] == pytest.approx(sparse.losses[10], rel=1e-4)  # the same function, a step later
    assert whole.losses[11:] != pytest.approx(sparse.losses[11:], rel=1e-4)
    for stopped in (9, 14):  # before and after
        folder = tmp_path / str(stopped)
        with interrupted(stopped):
            toy.run(folder, densify_at=10, **options)
        assert toy.run(folder, densify_at=10, **options).losses == whole.losses


def test_guides_hand_over_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy.initialised(toy.build), toy.Toy.batch
    layers = [layer for layer in model.modules() if isinstance(layer, el.Linear)]
    plain, shares, factors = toy.run(), list[float](), list[dict[str, Tensor]]()

    def spy(self: toy.Toy, step: int) -> tuple[Tensor, Tensor]:
        shares.extend({float(layer.get_buffer("share")) for layer in layers if isinstance(layer, Guided)})
        factors.append({name: p.detach().clone() for name, p in model.named_parameters() if "guide" not in name})
        return batch(self, step)

    monkeypatch.setattr(toy.Toy, "batch", spy)
    found = toy.run(model=model, guide_until=8, progress=lambda step, *_: step == 8 and spy(toy.Toy(), 8))
    assert found.losses[:2] == pytest.approx(plain.losses[:2], rel=1e-6)  # the head, which starts at zero, moves first
    assert found.losses[2:] != pytest.approx(plain.losses[2:], rel=1e-4)
    expected = [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)]
    assert shares == pytest.approx([*expected, expected[-1]])  # and none after these
    for name, p in factors[8].items():
        assert torch.equal(factors[9][name], p)  # it stays when guides are taken out
        assert not torch.equal(factors[0][name], p)  # but moved while they were there
    assert all(type(layer) is el.Linear for layer in layers)
    assert {*model.state_dict()} == {*toy.build().state_dict()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_guided_runs_go_on_exactly(tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"checkpoint_every": 1, "guide_until": 10, "evaluate_every": 3, "optimizer": optimizer}
    model = toy.initialised(toy.build)
    whole = toy.run(tmp_path / "whole", model=model, **options)
    for stopped in (7, 10, 11, 17):  # before guides are taken out, then, and after
        folder, other = tmp_path / str(stopped), toy.initialised(toy.build)
        with interrupted(stopped):
            toy.run(folder, model=other, **options)
        assert {*other.state_dict()} == {*model.state_dict()}  # guides are taken out however it ends
        saved = checkpoint.latest(folder / "checkpoints")
        assert saved is not None
        assert any("guide" in name for name in saved.tensors) == (saved.step <= 10)
        found = toy.run(folder, model=other, **options)
        assert (found.losses, found.metrics) == (whole.losses, whole.metrics)
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
        lines = [
            [{**line, "training_seconds": 0} for line in metrics.read(place / "metrics.jsonl")]
            for place in (folder, tmp_path / "whole")
        ]
        assert lines[0] == lines[1]


def test_no_state_is_lost_with_the_guides() -> None:
    """They learn at the rates of a dense model; when they go, what Adam knows of all others stays."""
    model, plain = toy.initialised(toy.build), toy.initialised(toy.build)
    with toy.last_step(model) as found:
        toy.run(model=model, steps=9, guide_until=4)
    with toy.last_step(plain) as expected:
        toy.run(model=plain, steps=9)
    assert {name: lr for name, (lr, _) in found.items()} == {name: lr for name, (lr, _) in expected.items()}
    assert {float(steps) for _, steps in found.values() if steps is not None} == {9}


def test_a_mixture_has_no_guide() -> None:
    model = toy.initialised(toy.build_gpt, experts=4)
    with pytest.raises(ValueError, match="is a MoELinear: guides are for layers"):
        toy.run(model=model, guide_until=4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_known_of_other_parameters_stays(optimizer: str) -> None:
    """When layers become dense, Adam starts anew for theirs alone, and all learn at the rates of a dense model."""
    model, dense = toy.initialised(toy.build), toy.initialised(toy.build, structure="dense")
    others = {name for name, _ in model.named_parameters()}
    with toy.last_step(model) as found:
        toy.run(model=model, steps=9, densify_at=4, optimizer=optimizer)
    with toy.last_step(dense) as expected:
        toy.run(model=dense, steps=9, optimizer=optimizer)
    assert {name: lr for name, (lr, _) in found.items()} == {
        name.replace(".A", ".weight"): lr for name, (lr, _) in expected.items()
    }
    counted = {name: float(steps) for name, (_, steps) in found.items() if steps is not None}  # of Adam, not of Muon
    assert counted == {name: 9 if name in others else 5 for name in counted}
    assert {*counted.values()} == {9, 5}
    assert not any(isinstance(layer, el.Linear) for layer in model.modules())


def test_processes_have_to_find_the_same_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 2, torch.device("cpu"))
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda found, own: found.__setitem__(slice(2), [own, 4]))
    world.check_equal(4, "checkpoints")
    with pytest.raises(ValueError, match="the processes found different checkpoints in x: 0, 4"):
        world.check_equal(0, "checkpoints in x")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    toy.run(tmp_path, metadata={"lr": 0.1, "data": "a"})
    with pytest.raises(ValueError, match=r"another config: lr was 0.1, now 0.2\. Name another folder"):
        toy.run(tmp_path, metadata={"lr": 0.2, "data": "a"})


def test_parts_of_a_batch_add_up() -> None:
    whole, parts = toy.run(steps=10), toy.run(steps=10, accumulate=4)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    with pytest.raises(ValueError, match="accumulate=3 does not divide the 16 samples"):
        toy.run(accumulate=3)


def test_groups_keep_their_ratios_and_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[dict[float, float]] = []
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append({group["lr_mult"]: group["lr"] for group in self.param_groups})
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    toy.run(steps=10, lr=1e-2, warmup=4, clip=0.01)
    assert len(rates[0]) > 2
    for i, by_multiplier in enumerate(rates):
        for multiplier, lr in by_multiplier.items():
            assert lr == pytest.approx(1e-2 * lr_factor("cosine", i, 10, 4) * multiplier)
    assert max(norms) <= 0.01 * 1.001


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"optimizer": "sgd", "lr": 1e-3},
        {"optimizer": "adam"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "product": True},
    ],
)
def test_other_ways(options: dict[str, Any]) -> None:
    found = toy.run(steps=60, **options)
    assert sum(found.losses[-10:]) < 0.9 * sum(found.losses[:10])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    found = toy.run(tmp_path, optimizer="sgd", lr=1e6, steps=50)
    assert found.diverged
    assert len(found.losses) < 50
    assert not math.isfinite(found.losses[-1])
    assert metrics.read(tmp_path / "metrics.jsonl")[-2]["train_loss"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adagrad"}, "optimizer must be adamw or adam or sgd or muon, not 'adagrad'"),
        ({"product": True}, "product=True needs optimizer='muon', not 'adamw'"),
        ({"schedule": "step"}, "schedule must be constant or cosine or linear"),
        ({"precision": "int8"}, "precision must be"),
        ({"warmup": 20}, "warmup must be from 0 to below the 20 steps"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"final_lr": 2.0}, "a share of lr, from 0 to 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"precision": "float16", "parallel": "fsdp"}, "take bfloat16"),
        ({"densify_at": 20}, "densify_at must be from 1 to below the 20 steps, not 20"),
        ({"densify_at": 10, "parallel": "fsdp"}, "take ddp"),
        ({"guide_until": 0}, "guide_until must be from 1 to below the 20 steps, not 0"),
        ({"guide_until": 20}, "guide_until must be from 1 to below the 20 steps, not 20"),
        ({"guide_until": 10, "parallel": "experts"}, "guide_until needs whole layers, .* take ddp"),
        ({"guide_until": 10, "densify_at": 9}, "must be at least guide_until, 10"),
    ],
)
def test_wrong_settings_say_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 20, **options})


def test_settings_are_plain_values() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(TrainingConfig(steps=3))))["steps"] == 3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.775, 0.55, 0.325]), ("cosine", [1, 0.868, 0.55, 0.232])],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    found = [lr_factor(schedule, step, 8, warmup=4, final=0.1) for step in range(8)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == pytest.approx(expected, abs=1e-3)


def run_and_tell(folder: Path, options: dict[str, Any], steps_made: Connection) -> None:
    """What a process does that is killed again and again."""
    found = toy.run(folder, pause=0.01, progress=lambda step, *_: steps_made.send(step), **options)
    (folder / "done.json").write_text(json.dumps([found.losses, dict(found.metrics)]))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Every kill costs at most what was made since the last checkpoint, and the run ends as if there had been none.

    With EINLINEAR_KILLS=100, that many.
    """
    options: dict[str, Any] = {"steps": 9 * KILLS, "checkpoint_every": 3, "log_every": 1, "evaluate_every": 7}
    whole = toy.run(tmp_path / "whole", **options)
    folder, draw = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    processes = multiprocessing.get_context("forkserver")  # forks one that has imported all of this already
    processes.set_forkserver_preload([__name__])
    for kill in range(KILLS + 1):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=run_and_tell, args=(folder, options, sender))
        process.start()
        sender.close()
        if kill < KILLS:
            for _ in range(draw.randrange(6)):
                receiver.recv()
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < KILLS else 0)
    losses, measures = json.loads((folder / "done.json").read_text())
    assert losses == list(whole.losses)
    assert measures == whole.metrics
    lines = metrics.read(folder / "metrics.jsonl")
    assert [(line["step"], line.get("train_loss"), line.get("error")) for line in lines] == [
        (line["step"], line.get("train_loss"), line.get("error"))
        for line in metrics.read(tmp_path / "whole" / "metrics.jsonl")
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"step-{9 * KILLS - 3:08}",
        f"step-{9 * KILLS:08}",
    ]


def test_the_model_is_not_changed_by_measuring() -> None:
    assert toy.run(steps=10, evaluate_every=1).losses == toy.run(steps=10).losses
