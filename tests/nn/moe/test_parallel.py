"""Experts that processes share: what is divided, here among one; tests/training has several and their training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import einlinear as el
from einlinear.nn.moe.parallel import expert_parallel


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_layer_with_two_names_is_divided_once(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    moe = el.MoELinear(16, 16, "low_rank(rank=2)", experts=4)
    model = nn.Sequential(moe, nn.GELU(), moe)
    whole = copy.deepcopy(model)
    assert expert_parallel(model, mesh) == ["0.A", "0.B", "2.A", "2.B"]

    x, grads = torch.randn(20, 16), []
    for each in (model, whole):
        y = each(x)
        y.square().mean().backward()
        grads.append(
            [y, *(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in each.parameters())]
        )
    assert len(grads[0]) == 5
    torch.testing.assert_close(*grads)


def test_indivisible_experts_raise(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="no layers with experts"):
        expert_parallel(nn.Linear(4, 4), mesh)
    model = nn.Sequential(el.MoELinear(16, 16, "btt", experts=4))
    expert_parallel(model, mesh)
    with pytest.raises(ValueError, match="the experts of 0 are sharded already"):
        expert_parallel(model, mesh)


def test_experts_that_are_normalised_together_raise(mesh: DeviceMesh) -> None:
    class Together(el.MoELinear):
        normalizes_stack = True

    assert expert_parallel(Together(16, 16, "btt", experts=4), mesh) == ["A", "B"]
    with pytest.raises(ValueError, match="the layer normalises its experts together: they cannot be sharded"):
        expert_parallel(Together(16, 16, "btt", experts=4, normalize=True), mesh)
