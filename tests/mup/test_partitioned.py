"""Parameters that are sharded, or have no values: their whole shapes count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.pytorch_utils import Conv1D

import einlinear as el


class Model(nn.Module):
    """Every kind of layer whose shape somebody might ask for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.positions = nn.Parameter(torch.ones(1, 10, width))
        self.table = nn.Parameter(torch.ones(3, width))
        self.up = el.Linear(width, 2 * width, "btt(rank=2)", normalize=True)
        self.down = nn.Linear(2 * width, width)
        self.convolution = nn.Conv2d(width, 2 * width, 3, groups=2)
        self.attention = nn.MultiheadAttention(width, 4, kdim=2 * width)
        self.conv1d = Conv1D(2 * width, width)
        self.mixture = el.MoELinear(width, width, "btt", experts=3, active=1)
        self.experts = nn.Parameter(torch.ones(3, 2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50)
        self.scale = nn.Parameter(torch.ones(1))


ROLES = {"table": "vector"}


def zero3(model: nn.Module) -> nn.Module:
    """What DeepSpeed leaves of the parameters of a model, as transformers and peft rely on it."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    return model


def mult(groups: list[dict[str, Any]], key: str = "lr_mult") -> dict[str, float]:
    return {name: group.get(key) for group in groups for name in group["param_names"]}


@pytest.fixture
def two_processes() -> Iterator[None]:
    """One of two, of which the other is only pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # type: ignore[no-untyped-call]
    yield
    torch.distributed.destroy_process_group()


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


@pytest.mark.usefixtures("two_processes")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of FSDP1, that it is old
@pytest.mark.parametrize("chosen", ["adamw", "sgd", "muon", "muon, product"])
@pytest.mark.parametrize("divide", [zero3, fsdp1, fsdp2, lambda model: model.to("meta")])
def test_groups_of_divided_parameters(divide: Callable[[nn.Module], nn.Module], chosen: str) -> None:
    optimizer, *product = chosen.split(", ")
    options: dict[str, Any] = {"lr": 0.1, "optimizer": optimizer, "weight_decay": 0.1, "roles": ROLES}
    options["product"] = bool(product)
    expected = el.param_groups(Model(64), base=Model(32), **options)
    model = divide(Model(64))
    for base in (Model(32), divide(Model(32)), el.base_shapes(divide(Model(32)), ROLES)):
        groups = el.param_groups(model, base=base, **options)
        for key in ("lr_mult", "weight_decay", "matrix_view", "gram_views", "update_scale"):
            assert mult(groups, key) == mult(expected, key)
    assert el.base_shapes(model) == el.base_shapes(Model(64))


def test_init_of_parameters_that_zero3_has_divided() -> None:
    model = zero3(Model(64))
    message = (
        r"positions of shape \(1, 10, 64\) is sharded by DeepSpeed's ZeRO-3.*"
        r"deepspeed\.zero\.GatheredParameters\(.*before deepspeed\.initialize, .*deepspeed\.zero\.Init"
    )
    with pytest.raises(ValueError, match=message):
        el.init_(model)
    for name, parameter in model.named_parameters():
        parameter.data = torch.zeros(parameter.ds_shape)  # as they are where they are gathered
        if name in ("positions", "norm.weight"):
            parameter.data.fill_(1)
    el.init_(model)
    assert float(model.get_parameter("down.weight").detach().std()) > 0


@pytest.mark.usefixtures("two_processes")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_init_of_parameters_that_fsdp_has_divided() -> None:
    model = fsdp1(Model(64))
    with pytest.raises(ValueError, match=r"is sharded by FSDP1.*summon_full_params\(model\)"):
        el.init_(model)
    with FullyShardedDataParallel.summon_full_params(model):
        el.init_(model)
    flat = FullyShardedDataParallel(Model(64), device_id=torch.device("cpu"))
    for call in (el.init_, el.base_shapes, lambda m: el.param_groups(m, 1e-3, base=None)):
        with pytest.raises(ValueError, match=r"wrapped in FSDP1, .*pass use_orig_params=True .*or use fully_shard"):
            call(flat)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_zero_starts_of_dtensors_are_kept() -> None:
    whole = Model(64)
    nn.init.zeros_(whole.head.weight)
    nn.init.zeros_(whole.up.B)  # type: ignore[arg-type]
    model: Any = el.init_(fsdp2(whole))
    assert not model.head.weight.to_local().any()
    assert not model.up.B.to_local().any()
    assert model.up.A.to_local().std() > 0
    assert model.down.weight.to_local().std() > 0
