"""Fused blocks in models that are wrapped by DDP or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.fusion.blocks import assert_equal, converted, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import einlinear as el


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_distributed_data_parallel(first: str, fused: list[str]) -> None:
    model, inputs = converted("Llama")
    expected = step(model, inputs)
    if first == "fuse":
        el.fuse(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if first == "wrap":
        el.fuse(wrapped)
    assert_equal(step(wrapped, inputs), expected)
    assert len(fused) == 2


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("shards", ["layers", "all"])
def test_fully_sharded(name: str, shards: str, fused: list[str]) -> None:
    model, inputs = converted(name)
    expected = step(model, inputs)[0]
    el.fuse(model)
    mesh = init_device_mesh("cpu", (1,))
    layers: Any = model.model.layers if name == "Llama" else model.bert.encoder.layer  # type: ignore[union-attr]
    for layer in layers:
        if shards == "all":
            fully_shard(layer.mlp if name == "Llama" else layer.intermediate, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = step(model, inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # the factors of BERT's first layer are freed before its second is called
    assert len(fused) == (0 if (name, shards) == ("BERT", "all") else 2)
    report = el.fuse(model)
    assert not report.blocks
    assert "has a DTensor for a parameter, as sharded layers have" in report.skipped[0][1]
    assert len(el.fuse(model, [inputs]).blocks) == 2
