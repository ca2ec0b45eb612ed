"""No speed without a right result, and no right result refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from einlinear import ops
from einlinear.structures import Structure
from einlinear_lab.bench.cases import BenchConfig, Case
from einlinear_lab.bench.machine import Roofline
from einlinear_lab.bench.run import Reference, measure
from einlinear_lab.bench.variants import OURS, Variant, make_variants, make_workload

SPECS = ("btt", "monarch", "low_rank(rank=8)", "kronecker", "tt(rank=4)", "dyad", "btt(rank=2, cores=3)")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_right_passes(spec: str, dtype: str) -> None:
    for sizes, tokens, mode in (((64, 128), 96, "train"), ((60, 47), 33, "train"), ((128, 64), 1, "decode")):
        p = make_workload(Case(spec, *sizes, tokens, mode, dtype, bias=True))
        found, _ = make_variants(p)
        with p.differentiating():
            reference = Reference(p)
            assert {variant.name: reference.complaint(variant) for variant in found} == {v.name: None for v in found}


class _Wrong(torch.autograd.Function):
    """The identity, whose gradient is off by one per cent."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def _one_entry(y: Tensor) -> Tensor:
    off = torch.zeros_like(y)
    off[-1, -1] = 0.01
    return y + off


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda y: 1.001 * y, "output is off"),
        (_one_entry, "output is off"),
        (lambda y: y.bfloat16().float(), "output is off"),
        (lambda y: y + torch.full_like(y, torch.nan), "output is off by nan"),
        (_Wrong.apply, "gradient of the input is off"),
    ],
)
def test_what_is_wrong_does_not(damage: Callable[[Tensor], Tensor], complaint: str) -> None:
    p = make_workload(Case("btt", 64, 64, 64, "train"))
    assert complaint in str(Reference(p).complaint(Variant("wrong", p.factors, lambda x: damage(p.layers[0](x)))))


def test_an_output_of_another_shape_is_wrong() -> None:
    p = make_workload(Case("btt", 64, 64, 64, "forward"))
    wrong = Variant("wrong", p.factors, lambda x: p.layers[0](x)[:, :1])
    assert "output is off by inf" in str(Reference(p).complaint(wrong))


def test_a_wrong_gradient_of_one_weight_is_found() -> None:
    p = make_workload(Case("btt", 64, 64, 64, "train"))
    first, second = p.factors

    def forward(x: Tensor) -> Tensor:
        return ops.linear(*p.structures, [first, _Wrong.apply(second)], x, backend="reference")

    assert "gradient of weight 2" in str(Reference(p).complaint(Variant("wrong", [first, second], forward)))


def test_a_variant_that_computes_wrongly_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear

    def wrong(structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Any, backend: Any = None) -> Tensor:
        y = right(structure, factors, x, bias, backend)
        return 1.01 * y if backend == "batched" else y

    monkeypatch.setattr(ops, "linear", wrong)
    result = measure(Case("btt", 64, 64, 32, "forward"), BenchConfig(budget=0), Roofline(1e11, 1e10))
    assert [m.name for m in result.failures] == ["batched"]
    (bmm,) = result.failures
    assert (bmm.seconds, bmm.speedup, bmm.over_copying, bmm.runs) == (None, None, None, 0)
    assert "output is off by" in str(bmm.refusal)
    assert result.of("batched") is None
    assert result.of(OURS) is not None


def test_a_variant_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear

    def broken(structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Any, backend: Any = None) -> Tensor:
        if backend == "reference":
            raise RuntimeError("out of luck")
        return right(structure, factors, x, bias, backend)

    monkeypatch.setattr(ops, "linear", broken)
    result = measure(Case("btt", 64, 64, 32, "forward"), BenchConfig(budget=0), Roofline(1e11, 1e10))
    assert [(m.name, m.refusal) for m in result.failures] == [("reference", "it raised out of luck")]
