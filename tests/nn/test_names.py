"""`layers` means the same everywhere: globs on whole names, which wrappers do not change, and None for the default."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import einlinear as el

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
WRAPPERS = (lambda model: torch.compile(model, backend="eager"), nn.DataParallel, checkpoint_wrapper)


class Nested(nn.Module):
    """A layer that is called as DDP calls what it wraps, and a block in a wrapper of its own."""

    def __init__(self, structure: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear: Any = nn.Linear if structure is None else lambda *size: el.Linear(*size, structure)
        self.module = nn.ModuleList(nn.Sequential(linear(16, 32), nn.Tanh(), linear(32, 16)) for _ in range(2))
        self.module[1] = checkpoint_wrapper(self.module[1])
        self.last = linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.module:
            x = block(x)
        return self.last(x)  # type: ignore[no-any-return]


def converted(model: nn.Module, **given: Any) -> list[str]:
    return [layer.name for layer in el.convert(model, "low_rank(rank=2)", **given).converted]


def densified(model: nn.Module, **given: Any) -> list[str]:
    return [layer.name for layer in el.densify(model, **given).converted]


def adapted(model: nn.Module, **given: Any) -> list[str]:
    return [layer.name for layer in el.adapt(model, "low_rank(rank=2)", **given).adapted]


def compressed(model: nn.Module, **given: Any) -> list[str]:
    return [layer.name for layer in el.compress(model, 0.5, ["low_rank"], [X], **given).layers]


FUNCTIONS = (converted, densified, adapted, compressed)
ALL = ["module.0.0", "module.0.2", "module.1.0", "module.1.2", "last"]


def build(function: Callable[..., list[str]]) -> nn.Module:
    return Nested("low_rank(rank=2)" if function is densified else None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on torch.compile
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrappers_do_not_change_names(function: Callable[..., list[str]]) -> None:
    for wrappers in (*permutations(WRAPPERS, 1), WRAPPERS):
        model: Any = build(function)
        for wrap in wrappers:
            model = wrap(model)
        assert function(model, layers=["module.1.*", "last"]) == ALL[2:]
        assert model(X).shape == X.shape
        assert sum(type(layer) is nn.Linear for layer in model.modules()) >= 2


@pytest.mark.parametrize("function", FUNCTIONS)
def test_none_is_all_and_globs_match_whole_names(function: Callable[..., list[str]]) -> None:
    assert function(build(function)) == function(build(function), layers=None) == ALL
    assert function(build(function), layers="*.0") == ["module.0.0", "module.1.0"]
    with pytest.raises(ValueError, match=r"layers: 'odule\.\*' matches no .* the nearest are module\."):
        function(build(function), layers="odule.*")
    with pytest.raises(TypeError, match="layers must be a glob such as"):
        function(build(function), layers=3)


def with_peft(function: Callable[..., list[str]]) -> nn.Module:
    """The same with an adapter of peft on the last layer."""
    from peft import LoraConfig, get_peft_model

    from einlinear.integrations import peft as lora

    config = LoraConfig(r=2, target_modules=["last"], init_lora_weights=False)
    return get_peft_model(build(function), lora.register(config) if function is densified else config)  # type: ignore[arg-type]


@needs("peft")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_adapters_of_peft_do_not_change_names(function: Callable[..., list[str]]) -> None:
    model = with_peft(function)
    assert function(model, layers=["module.1.*"]) == ["module.1.0", "module.1.2"]
    y = model(X)
    if function is densified:
        assert function(model, layers="last") == ["last"]
        torch.testing.assert_close(model(X), y)
        torch.testing.assert_close(model.merge_and_unload()(X), y)  # type: ignore[operator]
        return
    # merged into a structured layer, an adapter would be lost without an error
    with pytest.raises(ValueError, match=r"last:? has adapters of peft, .*call merge_and_unload\(\) first"):
        function(model, layers="last")
    with pytest.raises(ValueError, match=r"last\.lora_A\.default:? is a part of an adapter of peft"):
        function(model, layers="last.lora_A.default")
    assert function(with_peft(function)) == ALL[:-1]


def test_modules_that_are_called_as_wrappers_call_theirs() -> None:
    model = nn.ModuleDict({"model": nn.ModuleDict({"base_layer": nn.Linear(16, 16)})})
    assert converted(model) == ["model.base_layer"]


def test_layers_that_share_factors_are_densified_together() -> None:
    model = Nested("low_rank(rank=2)")
    model.module[0][0].A = model.module[1][0].A
    model.module[0][0].B = model.module[1][0].B
    with pytest.raises(ValueError, match=r"shares its factors with module\.1\.0, which layers do not match"):
        el.densify(model, "module.0.0")
    assert densified(model, layers="*.0") == ["module.0.0", "module.1.0"]
    assert model.module[0][0].weight is model.module[1][0].weight


def test_quantised_layers_are_densified_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    el.compress(model, 0.3, ["dense"], [X], count="bytes")
    expected = model(X)
    assert densified(model) == ["0", "2"]
    torch.testing.assert_close(model(X), expected)
