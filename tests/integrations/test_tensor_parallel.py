"""Tensor parallelism on 2 and 4 processes: one process computes, trains and saves the same."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from tests.integrations import parallel_runs as runs
from tests.processes import made_once, run_script
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

import einlinear as el
from einlinear.integrations.tensor_parallel import Colwise, Rowwise
from einlinear.structures import DoesNotFit

ONE = {"all_reduce": 1}
GATHER = {"all_gather_into_tensor": 1}
TABLES = {"table, low_rank": 2, "table, btt": 1, "table, btt, three cores": 1, "table, kronecker": 3}
TABLES |= {"table, dyad": 1, "table, mixed sum": 3}
COUNTS: dict[str, list[dict[str, int]]] = {
    **{name: [ONE, ONE] for name in runs.MODELS},
    # gradients of two replicated factors
    **{name: [ONE, {"all_reduce": 3}] for name in ("wide low_rank", "kronecker", "tt")},
    # ranks of two terms, and the output of the third
    "sum": [{"all_reduce": 3}, {"all_reduce": 3}],
    "mixed sum": [{"all_reduce": 2}, {"all_reduce": 2}],
    # a norm for each of four factors
    "normalize": [{"all_reduce": 5}, {"all_reduce": 5}],
    # inputs for the second router; ranks of the first factor, gradients of gates and of a replicated factor
    "mixtures": [{"all_gather_into_tensor": 1, "all_reduce": 1}, {"all_reduce": 4}],
    # one more for the residual connection
    "feed_forward": [ONE, {"all_reduce": 2}],
    # rows, and the outputs of the head; its inputs, and gradients of replicated factors
    **{name: [{"all_reduce": 1, **GATHER}, {"all_reduce": n}] for name, n in TABLES.items()},
    # the head's factors are those of a table that is not parallel
    "table, head alone": [GATHER, {"all_gather_into_tensor": 2, "all_reduce": 1}],
    **{name: [GATHER, {}] for name in ("table, features", "table, features of blocks")},
    # four norms, and the outputs; also a replicated factor, tokens and weights
    "gated_experts": [{"all_reduce": 5}, {"all_reduce": 7}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have saved; they run once for all processes of pytest."""
    return made_once(tmp_path_factory, "tensor_parallel", partial(run_script, runs.__file__))


@cache
def expected(name: str) -> dict[str, Any]:
    return runs.run(name)


def saved(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


# the indices of tables have no gradients
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("size", "name"), [*((4, name) for name in runs.MODELS), *((2, name) for name in runs.TRAINED)]
)
def test_processes_compute_what_one_does(folder: Path, size: int, name: str) -> None:
    alone, results = expected(name), [result[name] for result in saved(folder, size)]
    keys = ("y", "x", "grads", "trained")
    if name.startswith("sequence"):
        # every process has a part of the sequence
        assert_close(torch.cat([result["y"] for result in results], 1), alone["y"])
        assert_close(torch.cat([result["x"] for result in results], 1), alone["x"])
        keys = keys[2:]
    for result in results:
        for key in keys:
            assert_close(result[key], alone[key], rtol=1e-9, atol=1e-11)
    assert (name in runs.TRAINED) == any(not torch.equal(p, alone["trained"][key]) for key, p in start(name).items())


def start(name: str) -> dict[str, torch.Tensor]:
    return runs.state(runs.build(name))


@pytest.mark.parametrize("name", [name for name in runs.MODELS if not name.startswith("sequence")])
def test_collectives_of_a_forward_and_a_backward_pass(folder: Path, name: str) -> None:
    assert saved(folder, 4)[0][name]["counts"] == COUNTS[name]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_within_fsdp(folder: Path, optimizer: str) -> None:
    _, alone = runs.run_network(optimizer=optimizer)
    assert len({*alone["rates"].values()}) > 3
    for result in saved(folder, 4):
        assert_close(result[optimizer]["trained"], alone["trained"], rtol=1e-9, atol=1e-11)
        assert result[optimizer]["rates"] == alone["rates"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["4", "2x2"])
def test_checkpoints_of_four_processes_on_two_and_one(folder: Path, tmp_path: Path, name: str) -> None:
    model: nn.Module = runs.build("btt", seed=5) if name == "4" else runs.build_network(seed=5)
    whole = runs.state(runs.build("btt")) if name == "4" else saved(folder, 4)[0]["adamw"]["trained"]
    loaded = {"model": model.state_dict()}
    dcp.load(loaded, checkpoint_id=folder / name)
    for state in (loaded["model"], *(result[name] for result in saved(folder, 2))):
        assert_close(dict(state), dict(whole), rtol=0, atol=0)
    safetensors.torch.save_file(dict(whole), tmp_path / "model.safetensors")
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert_close(runs.state(model), dict(whole), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_example_prints_the_same_losses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(runs.EXAMPLE), "--steps", "4", "--out", str(tmp_path)])
    runpy.run_path(str(runs.EXAMPLE), run_name="__main__")
    alone, together = (
        [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)$", text, re.MULTILINE)]
        for text in (capsys.readouterr().out, (folder / "example-0.txt").read_text())
    )
    assert len(alone) == 4
    assert alone[-1] < 0.9 * alone[0]
    assert together == pytest.approx(alone, abs=1e-3)
    files = (tmp_path / "model.safetensors", folder / "example" / "model.safetensors")
    own, shared = (safetensors.torch.load_file(file) for file in files)
    assert {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in shared.items()}


@pytest.fixture
def two_processes() -> Iterator[None]:
    """One of two, of which the other is only pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # type: ignore[no-untyped-call]
    yield
    torch.distributed.destroy_process_group()


def test_placements(two_processes: None) -> None:
    mesh, layer = init_device_mesh("cpu", (2,)), el.Linear(64, 32, "low_rank(rank=4)", normalize=True)
    parallelize_module(layer, mesh, Colwise())
    placements = {name: p.placements for name, p in layer.named_parameters()}  # type: ignore[attr-defined]
    replicated, sharded = (Replicate(),), (Shard(0),)
    gammas = {"gamma_A": replicated, "gamma_B": replicated}
    assert placements == {"A": replicated, "B": sharded, "bias": sharded, **gammas}
    assert layer(torch.randn(3, 64)).shape == (3, 16)
    assert "colwise over 2 devices" in repr(layer)
    assert copy.deepcopy(layer)(torch.randn(3, 64)).shape == (3, 16)


def test_blocks_are_not_fused_any_more(two_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := el.ops.reason_unsupported("cpu", el.structure("btt", 64, 256), torch.float32, "cpu"):
        pytest.skip(why)
    fused: list[Any] = []
    original = el.ops.feed_forward

    def feed_forward(*args: Any) -> torch.Tensor:
        fused.append(args)
        return original(*args)

    monkeypatch.setattr(el.ops, "feed_forward", feed_forward)
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(64, 64)
    model = nn.Sequential(el.Linear(64, 256, "btt"), nn.GELU(), el.Linear(256, 64, "btt"))
    el.fuse(model)
    plan = {"0": Colwise(), "2": Rowwise()}
    for module, style in ((model, plan), (el.FeedForward(64, 256, "btt"), Colwise())):
        with torch.no_grad(), el.backend("cpu"):
            module(x)
            assert fused
            fused.clear()
            parallelize_module(module, mesh, style)
            assert module(x).shape == (64, 64)
            assert not fused


class Subclass(el.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "style", "error", "message"),
    [
        (lambda: el.Linear(64, 27, "btt"), Colwise, DoesNotFit, "2 devices cannot share the axis 'f' of its output"),
        (lambda: el.Linear(64, 27, "btt"), Colwise, DoesNotFit, "of size 9; 3 or 9 devices can"),
        (lambda: el.Linear(64, 59, "btt"), Colwise, DoesNotFit, "59 output features are padded.*take 60 output"),
        (lambda: el.Linear(61, 64, "btt"), Rowwise, DoesNotFit, "61 input features are padded.*take 63 input"),
        (lambda: el.Linear(64, 1, "dense"), Colwise, DoesNotFit, "leave the layer replicated"),
        (lambda: el.FeedForward(64, 27, "btt"), Colwise, DoesNotFit, "of size 9; 3 or 9 devices can"),
        (lambda: el.FeedForward(64, 64, "btt"), Rowwise, TypeError, "use Colwise"),
        (lambda: el.Embedding(59, 64, "btt"), Rowwise, DoesNotFit, "59 output features are padded.*take 60 output"),
        (lambda: el.Embedding(64, 61, "btt"), Colwise, DoesNotFit, "61 input features are padded"),
        (lambda: el.nn.GatedExperts(64, 27, "btt"), Colwise, DoesNotFit, "of size 9; 3 or 9 devices can"),
        (lambda: el.nn.GatedExperts(64, 64, "btt"), Rowwise, TypeError, "a GatedExperts, whose hidden.*use Colwise"),
        (
            lambda: el.nn.GatedExperts(64, 64, "btt"),
            lambda: Colwise(input_layouts=Shard(1)),
            ValueError,
            "replicated tokens and return replicated",
        ),
        (lambda: el.nn.MoEFeedForward(64), Colwise, TypeError, "divide its experts by .*expert_parallel"),
        (
            lambda: el.nn.QuantizedLinear(64, 64, "btt", precision="int8"),
            Colwise,
            TypeError,
            "not for a QuantizedLinear: compress with count='params'",
        ),
        (lambda: nn.LayerNorm(64), Colwise, TypeError, r"Colwise is for einlinear\.Linear, .*not for LayerNorm"),
        (lambda: Subclass(64, 64, "btt"), Rowwise, TypeError, r"Rowwise is for .*not for Subclass"),
        (lambda: el.Linear(64, 64, "btt"), lambda: Rowwise(output_layouts=Partial()), ValueError, r"not Partial\(\)"),
    ],
)
def test_layers_that_cannot_be_shared(
    two_processes: None, make: Callable[[], nn.Module], style: Any, error: type[Exception], message: str
) -> None:
    layer = make()
    before = {name: type(p) for name, p in layer.named_parameters()}
    with pytest.raises(error, match=message):
        parallelize_module(layer, init_device_mesh("cpu", (2,)), style())
    assert {name: type(p) for name, p in layer.named_parameters()} == before


def test_mistakes(two_processes: None) -> None:
    mesh, layer = init_device_mesh("cpu", (2,)), el.Linear(64, 64, "btt")
    with pytest.raises(ValueError, match=r"the mesh has 2 dimensions.*mesh\['tp'\]"):
        Colwise()._apply(layer, init_device_mesh("cpu", (2, 1)))
    parallelize_module(layer, mesh, Rowwise())
    with pytest.raises(ValueError, match="parallel already: name every layer once"):
        parallelize_module(layer, mesh, Colwise())
    assert layer(torch.randn(3, 32)).shape == (3, 64)
    with pytest.raises(RuntimeError, match=r"shape \(3, 64\) on this device.*in_features=64: make the layer before"):
        layer(torch.randn(3, 64))
