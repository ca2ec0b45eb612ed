"""Structured embeddings equal the rows of their dense table, forward and backward, and never build it."""

from __future__ import annotations

import pytest
import torch
from tests.families import SAMPLES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.structures import DoesNotFit

# (rows, features): some structures are padded
SIZES = [(96, 64), (61, 59)]
SPECS = [spec for specs in SAMPLES.values() for spec in specs]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_and_gradients_equal_those_of_the_dense_table(spec: str, size: tuple[int, int]) -> None:
    try:
        table = el.Embedding(*size, spec, dtype=torch.float64)
    except DoesNotFit:
        # this size needs another number of blocks
        assert size == SIZES[1]
        return
    numbers = torch.randint(size[0], (3, 7))
    weight, upstream = table.dense_weight(), torch.randn(3, 7, size[1], dtype=torch.float64)
    rows = table(numbers)
    torch.testing.assert_close(rows, weight[numbers])
    parameters = list(table.parameters())
    expected = torch.autograd.grad((weight[numbers] * upstream).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((rows * upstream).sum(), parameters), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_new_tables_have_entries_of_size_one(spec: str) -> None:
    # entries of few factors vary from table to table
    means = [float(el.Embedding(256, 128, spec).dense_weight().detach().square().mean()) for _ in range(100)]
    assert 0.8 < sum(means) / len(means) < 1.25


def test_lookups_do_not_build_the_table() -> None:
    table = el.Embedding(2**20, 2**10, "low_rank(rank=4)")
    with FlopCounterMode(display=False) as counter:
        rows = table(torch.tensor([0, 2**20 - 1]))
    assert rows.shape == (2, 2**10)
    assert counter.get_total_flops() <= 2 * 2 * 4 * 2**10


def test_padding_passes_no_gradient_on() -> None:
    table = el.Embedding(10, 8, "low_rank(rank=2)", padding_idx=-1)
    assert table.padding_idx == 9
    rows = table(torch.tensor([3, 9]))
    torch.testing.assert_close(rows, table.to_dense()(torch.tensor([3, 9])))
    rows[1].sum().backward()
    assert not any(p.grad.any() for p in table.parameters() if p.grad is not None)


def test_projection_is_exact_for_a_table_of_the_structure() -> None:
    dense = el.Embedding(96, 64, "btt(rank=2)", padding_idx=0).double().to_dense()
    dense = dense.requires_grad_(False).eval()
    table = el.Embedding.from_dense(dense, "btt(rank=2)")
    torch.testing.assert_close(table.dense_weight(), dense.weight)
    assert (table.padding_idx, table.training, table.A.requires_grad) == (0, False, False)
    torch.testing.assert_close(el.Embedding.from_dense(dense.weight, "btt(rank=2)").dense_weight(), dense.weight)


def test_compiled_and_in_half_precision() -> None:
    table = el.Embedding(61, 59, "btt(rank=2)", dtype=torch.bfloat16)
    numbers = torch.randint(61, (4, 5))
    assert table(numbers).dtype == torch.bfloat16
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(numbers), table(numbers))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_traced_for_inputs_of_any_length() -> None:
    table = el.Embedding(61, 59, "btt(rank=2)")
    traced = torch.jit.trace(table, torch.randint(61, (2, 3)))
    longer = torch.randint(61, (4, 5))
    torch.testing.assert_close(traced(longer), table(longer))


def test_the_weight_is_that_of_torch() -> None:
    table = el.Embedding(10, 8, "low_rank(rank=2)", dtype=torch.bfloat16)
    assert (table.weight.shape, table.weight.dtype) == ((10, 8), torch.bfloat16)
    torch.testing.assert_close(table.weight + 0, table.dense_weight())


@pytest.mark.parametrize("empty", [(0,), (2, 0)])
def test_no_numbers_give_no_rows(empty: tuple[int, ...]) -> None:
    assert el.Embedding(10, 8, "dense")(torch.empty(empty, dtype=torch.long)).shape == (*empty, 8)


def test_mistakes_are_named() -> None:
    # 61 rows are padded to 64
    table = el.Embedding(61, 64, "btt")
    for wrong in (61, 63, -1):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range: the embedding has rows 0 to 60"):
            table(torch.tensor([0, wrong]))
    with pytest.raises(TypeError, match=r"an embedding takes integers, not torch\.float32"):
        table(torch.zeros(2))
    with pytest.raises(ValueError, match="padding_idx must be the index of one of 61 rows, not 61"):
        el.Embedding(61, 64, "btt", padding_idx=61)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Embedding or its weight, not a ReLU"):
        el.Embedding.from_dense(nn.ReLU(), "btt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load it first"):
        el.Embedding.from_dense(nn.Embedding(4, 4, device="meta"), "dense")


def test_learning_rates_follow_the_sums_of_a_row() -> None:
    model = nn.ModuleDict({"table": el.Embedding(100, 128, "low_rank(rank=16)")})
    base = nn.ModuleDict({"table": nn.Embedding(100, 32)})
    groups = el.param_groups(model, 1.0, base=base, weight_decay=0.1)
    # A (16, 128) sums up 16 numbers for an entry of a row, B (100, 16) is a table itself; both learn at a half
    assert {g["param_names"][0]: g["lr_mult"] for g in groups} == {"table.A": 1 / 32, "table.B": 1 / 2}
    # each shrinks by half of lr * weight_decay
    assert {g["lr"] * g["weight_decay"] for g in groups} == {0.05}


@pytest.mark.parametrize("spec", ["low_rank(rank=4)", "low_rank(rank=64)", "btt(rank=1)", "btt(rank=4)"])
def test_updates_of_rows_have_the_size_of_the_learning_rate(spec: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": el.Embedding(256, 256, spec)})
    numbers, upstream = torch.arange(256), torch.randn(256, 256)
    before = model["table"](numbers).detach()
    optimizer = torch.optim.AdamW(el.param_groups(model, 1e-3, base=None, weight_decay=0.0))
    (model["table"](numbers) * upstream).sum().backward()
    optimizer.step()
    change = (model["table"](numbers) - before).detach().square().mean().sqrt() / 1e-3
    assert 0.2 < float(change) < 2
