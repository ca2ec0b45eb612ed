"""Optimizers of torch and other packages, with the groups of `param_groups`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import einlinear as el
from einlinear.mup import Blockwise, Muon

# of factors A and B, to (g, r f, a) and (f, e, g r): the axes of the matrices of B are not next to each other
PATTERN, SIZES = "(g a), a g r f, r f g e -> (f e)", {"g": 4, "a": 6, "f": 5, "e": 6, "r": 2}


def schedule_free(groups: list[dict[str, Any]], **options: Any) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, **options)
    optimizer.train()
    return optimizer


def soap(groups: Any, **options: Any) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(groups, **{"precondition_frequency": 2, **options})


def blockwise_soap(groups: list[dict[str, Any]], **options: Any) -> Blockwise:
    return Blockwise(groups, soap, **options)


def build() -> Any:
    torch.manual_seed(0)
    structure = el.structure(PATTERN, 24, 30, sizes=SIZES)
    return nn.Sequential(nn.Linear(12, 24), el.Linear(24, 30, structure), nn.LayerNorm(30), nn.Linear(30, 4))


def groups_of(model: nn.Module, optimizer: str = "adamw", lr: float = 0.01, **options: Any) -> list[dict[str, Any]]:
    base = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 10), nn.LayerNorm(10), nn.Linear(10, 4))
    return el.param_groups(model, lr, base=base, optimizer=optimizer, **{"weight_decay": 0.3, **options})


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


ALL = [
    pytest.param(torch.optim.AdamW, "adamw", id="AdamW"),
    pytest.param(schedule_free, "adamw", id="schedule-free", marks=needs("schedulefree")),
    pytest.param(soap, "adamw", id="SOAP", marks=needs("pytorch_optimizer")),
    pytest.param(blockwise_soap, "soap", id="blockwise SOAP", marks=needs("pytorch_optimizer")),
]


@pytest.mark.parametrize(("optimizer", "name"), ALL)
def test_groups_keep_their_settings_and_resume(optimizer: Callable[..., Any], name: str) -> None:
    whole, parts = build(), build()
    groups = groups_of(whole, name, eps=1e-8)
    assert len({group["lr"] for group in groups}) > 2
    assert len({group["weight_decay"] for group in groups}) > 2
    used = optimizer(copy_of(groups))
    train(whole, used, range(6))
    el.check_groups(used, groups)

    first = optimizer(groups_of(parts, name, eps=1e-8))
    train(parts, first, range(3))
    again = optimizer(groups_of(parts, name, lr=1.0, eps=1e-8))
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    el.check_groups(again, groups_of(parts, name, eps=1e-8))
    train(parts, again, range(3, 6))
    for (parameter, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), parameter
        assert not torch.equal(p, build().get_parameter(parameter))


def copy_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group} for group in groups]


@pytest.mark.parametrize(("optimizer", "name"), ALL[:2])
def test_the_first_step_has_the_rate_and_decay_of_every_group(optimizer: Callable[..., Any], name: str) -> None:
    model = build()
    groups = groups_of(model, name)
    backward(model, 0)
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer(groups, eps=1e-12).step()
    for group in groups:
        for p in group["params"]:
            step = p.grad.sign() + group["weight_decay"] * before[p]
            torch.testing.assert_close(p.detach(), before[p] - group["lr"] * step, atol=1e-5, rtol=1e-4)


@needs("schedulefree")
def test_schedule_free_averages_alike_in_all_groups() -> None:
    """Its average is weighted by the square of the largest rate of a group: constant factors cancel."""
    model = build()
    optimizer = schedule_free(groups_of(model), warmup_steps=3)
    seen: list[dict[Tensor, Tensor]] = []
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        seen.append({p: state["z"].clone() for p, state in optimizer.state.items()})
    optimizer.eval()
    weights = torch.tensor([1 / 9, 4 / 9, 1, 1, 1]) / (3 + 5 / 9)
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), sum(w * z[p] for w, z in zip(weights, seen, strict=True)))


def blocks_of(first: Any, second: Any) -> list[Tensor]:
    """The matrices of both factors, or of their gradients."""
    g, a, f, e, r = (SIZES[axis] for axis in "gafer")
    of_a = torch.einsum("agrf->grfa", first).reshape(g, r * f, a)
    return [*of_a, *torch.einsum("rfge->fegr", second).reshape(f, e, g * r)]


@needs("pytorch_optimizer")
def test_every_block_has_its_own_preconditioners() -> None:
    model = build()
    optimizer = blockwise_soap(groups_of(model, "soap"))
    apart = [nn.Parameter(block.detach().clone()) for block in blocks_of(model[1].A, model[1].B)]
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    of_blocks = [by_name["1.A"]] * SIZES["g"] + [by_name["1.B"]] * SIZES["f"]
    keys = ("lr", "weight_decay")
    expected = soap([{"params": [p], **{k: group[k] for k in keys}} for p, group in zip(apart, of_blocks, strict=True)])
    for step in range(6):
        backward(model, step)
        for p, gradient in zip(apart, blocks_of(model[1].A.grad, model[1].B.grad), strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        expected.step()
    for p, block in zip(apart, blocks_of(model[1].A, model[1].B), strict=True):
        torch.testing.assert_close(p, block)


def rescaled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in which torch's Muon, whose updates have spectral norm max(1, rows / columns)^(1/2), moves as ours."""
    for group in groups:
        _, rows, columns = group["matrix_view"]
        scale = group["update_scale"] / math.sqrt(max(1, rows / columns))
        group["lr"] *= scale
        group["weight_decay"] /= scale
    return groups


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_of_torch_moves_blocks_as_ours() -> None:
    ours, theirs, start = build(), build(), build()
    matrices = [group for group in groups_of(theirs, "muon", lr=0.1) if "matrix_view" in group]
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon(copy_of(matrices))
    names = [name for group in matrices for name in group["param_names"]]
    optimizer = Blockwise(rescaled(matrices), torch.optim.Muon)
    train(ours, Muon([group for group in groups_of(ours, "muon", lr=0.1) if "matrix_view" in group]), range(4))
    train(theirs, optimizer, range(4))
    assert_moved_alike(names, ours, theirs, start)


def assert_moved_alike(names: Iterable[str], *models: nn.Module) -> None:
    for name in names:
        p, q, before = (model.get_parameter(name).detach() for model in models)
        assert 0 < float((p - q).norm()) < 0.05 * float((p - before).norm()), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_of_torch_takes_dense_matrices() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 8))
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)

    def matrices(model: nn.Module) -> list[dict[str, Any]]:
        base = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
        groups = el.param_groups(model, 0.1, base=base, optimizer="muon", weight_decay=0.1)
        return [group for group in groups if "matrix_view" in group]

    pairs: list[tuple[nn.Module, torch.optim.Optimizer]] = [
        (ours, Muon(matrices(ours))),
        (theirs, torch.optim.Muon(rescaled(matrices(theirs)))),
    ]
    for model, optimizer in pairs:
        for step in range(4):
            # of full rank: torch's Muon computes in bfloat16, which scatters singular values near zero
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    assert_moved_alike(["0.weight", "1.weight"], ours, theirs, start)


def test_blocks_follow_schedules_and_parameters_without_gradients_stay() -> None:
    model = build()
    optimizer = Blockwise(groups_of(model, "soap", weight_decay=0.0), torch.optim.SGD)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=1)
    for factor in (0.5, 1.0):
        backward(model, 0)
        model[1].B.grad = None
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        schedule.step()
        for group in groups_of(model, "soap"):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                step = 0.0 if name == "1.B" else factor * group["lr"] * p.grad
                torch.testing.assert_close(p.detach(), before[name] - step)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_blocks_of_sharded_parameters() -> None:
    plain, sharded = build(), build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for model in (plain, sharded):
        train(model, Blockwise(groups_of(model, "soap"), torch.optim.AdamW), range(4))
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.full_tensor())  # type: ignore[attr-defined]


@needs("pytorch_optimizer")
@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)", "monarch(blocks=4)"])
def test_features_change_equally_at_every_width_with_soap(structure: str) -> None:
    updates = []
    for width in (64, 256):
        torch.manual_seed(0)
        layers = [nn.Linear(32, width), nn.GELU(), el.Linear(width, width, structure), nn.GELU(), nn.Linear(width, 10)]
        model = el.init_(nn.Sequential(*layers), zero="4")
        base = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
        optimizer = blockwise_soap(el.param_groups(model, 1e-2, base=base, optimizer="soap", lr_scale={"0": 0.0}))
        changes = []
        for _ in range(10):
            x = torch.randn(256, 32)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
            before = model[:3](x).detach()
            optimizer.step()
            changes.append((model[:3](x).detach() - before).square().mean().sqrt())
        # the first steps move the head, from zero
        updates.append(float(torch.stack(changes[2:]).mean()))
    # with the multipliers of Adam, the wide layers change half as much
    assert max(updates) < 1.4 * min(updates), updates
